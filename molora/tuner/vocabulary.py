"""A vocabulary that was resized: its new rows are in no base, so they are saved with the adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig

from molora.disk.fingerprint import embeddings_of, token_count
from molora.tuner.config import MoLoraConfig

_ALWAYS = -1


def note_tokens(config: MoLoraConfig, model: nn.Module) -> None:
    """Note how many tokens a base has when it gets its adapter."""
    config.__dict__["_tokens"] = token_count(model)


def embeddings_to_save(
    model: nn.Module, config: MoLoraConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Input and output embeddings by their keys in the state dict, where the vocabulary is not the one the base came with.

    Modules that the adapter trains whole (`modules_to_save`) are left out: PEFT saves them.
    """
    tokens, before = token_count(model), _tokens_of_base(model, config)
    if tokens is None or before is None or tokens == before:
        return {}
    if before != _ALWAYS:
        warnings.warn(
            f"the base had {before:,} tokens and has {tokens:,}: its embeddings are saved with the adapter. Before "
            f"loading it, give the base as many: base.resize_token_embeddings({tokens}).",
            stacklevel=2,
        )
    whole = {id(part) for wrapper in _wrappers(model) for part in wrapper.modules()}
    plain = {id(module) for module in embeddings_of(model)} - whole
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if id(module) in plain:
            found |= {key: state[key] for own in module.state_dict() if (key := f"{name}.{own}") in state}
    return found


def brought_along(model: nn.Module, saved: Mapping[str, Tensor]) -> set[int]:
    """`data_ptr()` of the base's weights that a loaded adapter does not use, or overwrites: it has its own."""
    replaced = {p.data_ptr() for wrapper in _wrappers(model) for p in wrapper.original_module.parameters()}
    return replaced | {tensor.data_ptr() for tensor in saved.values()}


def without_doubles(model: nn.Module, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the second copies of modules trained whole that PEFT writes with `save_embedding_layers`."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    known = model.state_dict()
    return {
        key: tensor
        for key, tensor in loaded.items()
        if key in known
        or not any(re.search(rf"(^|\.){re.escape(name)}\.modules_to_save\.", key) for name in wrapped)
    }


def note_loaded(model: nn.Module, config: MoLoraConfig, loaded: Mapping[str, Tensor]) -> None:
    """Note that an adapter brought its own embeddings, so that it is saved with them again."""
    plain = {id(module) for module in embeddings_of(model)}
    names = [name for name, module in model.named_modules() if id(module) in plain]
    if any(key == f"{name}.weight" or key.endswith(f".{name}.weight") for name in names for key in loaded):
        config.__dict__["_tokens"] = _ALWAYS


def _wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _tokens_of_base(model: nn.Module, config: MoLoraConfig) -> int | None:
    """How many tokens the base came with: when it got its adapter, or by its own config where that is at hand."""
    before: int | None = config.__dict__.get("_tokens")
    if before is None or before != token_count(model) or not config.base_model_name_or_path:
        return before
    try:
        declared = AutoConfig.from_pretrained(config.base_model_name_or_path, local_files_only=True)
    except (OSError, ValueError):  # not on this machine
        return before
    base: Any = getattr(model, "config", None)
    if not hasattr(base, "get_text_config") or _vocabulary(base) != before:
        return before  # its config does not tell
    return _vocabulary(declared) or before


def _vocabulary(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)

"""Checks of an adapter's tensors before they are loaded into a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import AdapterError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BANKS = ("molora_experts", "molora_gate", "molora_router", "molora_prompt")
_PREFIX = "base_model.model."
_HINT = "the file is damaged or belongs to another adapter; copy it again."


def check_state_dict(model: nn.Module, config: Any, adapter: str, given: Mapping[str, Tensor]) -> None:
    """Compare the tensors about to be loaded, under the model's own names, with those of the adapter in the model.

    Raises:
        AdapterError: keys missing or not known, shapes or dtypes that differ, values that are not finite; all of
            them listed. Or values other than those of which `config.weights_sha256` was noted.
    """
    expected = adapter_tensors(model, adapter)
    ours = {name: tensor for name, tensor in given.items() if _is_ours(name)}
    base = model.state_dict()
    known = {*base, *expected}
    problems = _listed("missing", (name for name in expected if name not in ours))
    problems += _listed("unknown", (name for name in given if not {name, name.removeprefix(_PREFIX)} & known))
    for name, tensor in given.items():
        shape = expected[name].shape if name in expected else tensor.shape
        if tensor.shape != shape:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if name not in expected:
            problems += _other_vocabulary(name, tensor, base.get(name, base.get(name.removeprefix(_PREFIX))))
        if tensor.dtype not in _FLOATS:
            problems.append(f"{name}: dtype {tensor.dtype}, expected floating point")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name}: holds values that are not finite")
    if problems:
        shown = problems[:10] + [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        raise AdapterError(
            "the adapter's tensors do not fit its config:\n  " + "\n  ".join(shown), hint=_HINT
        )
    if config.weights_sha256 is not None and digest(ours, adapter) != config.weights_sha256:
        raise changed(config.weights_sha256, digest(ours, adapter))


def check_finite(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of an adapter that is about to be written; AdapterError where it could not be loaded again.

    Tensors that are spread over processes are not looked at: this one may be the only one to save.
    """
    here = {name: value for name, value in tensors.items() if _in_memory(value)}
    wrong = [name for name, value in here.items() if not torch.isfinite(value).all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise AdapterError(
            f"{wrong[0]}{more}: holds values that are not finite, so the adapter is not written.",
            hint="its training diverged: go back to an earlier checkpoint, with a lower learning rate.",
        )
    return tensors


def _other_vocabulary(name: str, tensor: Tensor, base: Tensor | None) -> list[str]:
    """What to say of embeddings saved with an adapter that have other rows than the base's."""
    own = any(part in name.split(".") for part in ("modules_to_save", "token_adapter"))
    if (
        own
        or base is None
        or tensor.dim() == 0
        or tensor.shape[1:] != base.shape[1:]
        or len(tensor) == len(base)
    ):
        return []
    first = f"first base.resize_token_embeddings({len(tensor)})"
    return [f"{name}: {len(tensor)} tokens, the base has {len(base)}; {first}"]


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors in a model, as they are saved, under the model's own names."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf == adapter and parent.rpartition(".")[2] in _BANKS:
            found.update(module.state_dict(prefix=f"{name}."))
    return found


def changed(stored: str, found: str | None) -> AdapterError:
    """The error of tensors whose digest is not the one that was noted when they were saved."""
    return AdapterError(
        f"the adapter's tensors are not the ones that were saved:\n  expected sha256 {stored}\n  actual   sha256 {found}",
        hint=f"{_HINT[:-1]}; if they were changed on purpose, set weights_sha256 to null in adapter_config.json.",
    )


def digest(tensors: Mapping[str, Tensor], adapter: str) -> str | None:
    """sha256 of the expert and gate tensors, whatever their keys' prefix and adapter name; None if not in memory."""
    total = hashlib.sha256()
    ours = {_bare(name, adapter): tensor for name, tensor in tensors.items() if _is_ours(name)}
    for name in sorted(ours):
        tensor = ours[name].detach()
        if not _in_memory(tensor):
            return None
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _in_memory(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)


def _is_ours(name: str) -> bool:
    return any(bank in name.split(".") for bank in _BANKS)


def _bare(name: str, adapter: str) -> str:
    parts = name.removeprefix(_PREFIX).split(".")
    place = next(i for i, part in enumerate(parts) if part in _BANKS)
    if parts[place + 1] == adapter:
        del parts[place + 1]
    return ".".join(parts)


def _listed(what: str, names: Iterable[str]) -> list[str]:
    return [f"{name}: {what}" for name in sorted(names)]

"""Which linears are adapted, which of them read the same input, and which sequence they read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import match_target_against_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.tuner.config import MoLoraConfig

SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of linears that read one input when they share a parent. In cross attention the first reads another."""

TASK_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that PEFT's task models train whole, but name in `modules_to_save` only after the layers were replaced."""

CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "encoder_attention")

CROSS_READERS = {name for members in SIBLINGS[:5] for name in members[1:]} | {"c_attn", "kv_proj", "kv"}
"""Linears of cross attention that read the encoder's output; the others read the decoder's own."""

ROWS_OF_THEIR_OWN = ("experts",)
"""Modules whose linears read other rows than the sequence's: each expert of the base the tokens it was sent."""


def group_key(key: str, share: str, stream: str) -> str:
    """The name of the group whose gate a linear uses; linears outside any group stand alone.

    Args:
        key: the linear's module name.
        share: `linear`, `group` (linears that read one input), `block` (of the transformer), `global`, or a
            regular expression whose first group names the gate.
        stream: whose tokens it reads; linears of different sequences never share a gate over blocks.
    """
    if share == "global":
        return ""
    if share == "block":
        number = re.search(r"(?:^|\.)\d+(?=\.|$)", key)
        return f"{key[: number.end()]} {stream}" if number else key
    if share not in ("linear", "group"):
        found = re.search(share, key)
        return f"{found[1]} {stream}" if found else key
    parent, _, name = key.rpartition(".")
    for members in SIBLINGS:
        if share == "group" and name in members:
            crossed = is_cross_attention(key)
            own = "query" if crossed and name == members[0] else "shared"
            return f"{parent}.[{members[0]}].{own}"
    return key


def is_cross_attention(key: str) -> bool:
    """Whether a module belongs to attention from a decoder to an encoder."""
    return any(part in CROSS_ATTENTION for part in key.split("."))


def stream_of(key: str, encoder_decoder: bool) -> str:
    """Whose tokens the linear reads: `encoder`, `decoder` (the only sequence of other models), or `none` that are known.

    A decoder may itself hold a module called encoder (BERT as a decoder does): the outermost name decides.
    """
    parts = key.split(".")
    if any(part in ROWS_OF_THEIR_OWN for part in parts):
        return "none"
    if not encoder_decoder:
        return "decoder"
    if is_cross_attention(key) and parts[-1] in CROSS_READERS:
        return "encoder"
    return next((part for part in parts if part in ("encoder", "decoder")), "decoder")


def block_index(key: str) -> int | None:
    """Index of the transformer block a module lies in: the first number in its path."""
    return next((int(part) for part in key.split(".") if part.isdigit()), None)


def matches(targets: Iterable[str] | str | None, key: str) -> bool:
    """Whether a module matches a regex or a list of suffixes, by PEFT's rules."""
    if not targets:
        return False
    if isinstance(targets, str):
        return bool(match_target_against_key(targets, key))
    return any(key == target or key.endswith(f".{target}") for target in targets)


def is_target(config: MoLoraConfig, key: str, without: Collection[str] = ()) -> Any:
    """PEFT's decision for target_modules, widened by plain_targets and ffn_targets, but never a module of `without`.

    PEFT looks at `layers_to_transform` only where target_modules lists suffixes; here it limits every kind of target.
    """
    if key in without:
        return False
    result = check_target_module_exists(config, key)
    also = matches(config.plain_targets, key) or matches(config.ffn_targets, key)
    if not (result or also):
        return result
    if matches(config.exclude_modules, key) or matches(TASK_HEADS.get(str(config.task_type)), key):
        return False
    if config.layers_to_transform is not None:
        return _in_layers(config, key)
    return result or True


def _in_layers(config: MoLoraConfig, key: str) -> bool:
    """Whether a module lies in `layers_to_transform`, by PEFT's rule for lists."""
    parent, _, name = key.rpartition(".")
    rule = SimpleNamespace(
        target_modules={name},
        exclude_modules=None,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(parent) and bool(check_target_module_exists(rule, key))


def linear_names(model: nn.Module) -> list[str]:
    """Distinct last names of a model's linear layers: what target_modules may list."""
    paths = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    names = {path.rpartition(".")[2] for path in paths}
    return sorted(name for name in names if not name.isdigit())


def check_targets(config: MoLoraConfig, model: nn.Module) -> None:
    """Raise ConfigError for the first listed target that matches no module, naming candidates."""
    keys = [key for key, _ in model.named_modules() if key]
    for what in ("target_modules", "plain_targets", "ffn_targets"):
        targets = getattr(config, what)
        if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):
            continue
        parts = {targets: targets} if isinstance(targets, str) else {t: [t] for t in sorted(targets)}
        for target, pattern in parts.items():
            if not any(matches(pattern, key) for key in keys):
                candidates = linear_names(model)
                hint = 'list suffixes of module names, give a regex, or use "all-linear".'
                text = f"{what}: {target!r} matches no module of {type(model).__name__}.{did_you_mean(target, candidates)}"
                raise ConfigError(f"{text} Linear layers: {', '.join(candidates)}.", hint=hint)


def pattern_value(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """PEFT's pattern rule: the first pattern that matches the end of the module's name wins."""
    return next((value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", key)), default)


def hidden_size(model: nn.Module, what: str) -> int:
    """Width of a transformers model's hidden states; `what` needs it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "hidden_size", None)
    if size is None:
        raise ConfigError(f"{what} needs a transformers model, whose config names its hidden_size.")
    return int(size)

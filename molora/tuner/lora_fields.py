"""Settings of PEFT's LoraConfig that a mixture does not have, and what to use instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any

from peft import LoraConfig

from molora.errors import ConfigError

_BY_PEFT = "PEFT's LoraConfig has it; a LoRA trained so can become an expert where its tensors are plain (molora.import_lora)."
INSTEAD: dict[str, str] = {
    "init_lora_weights": "use init='kaiming', 'gaussian', 'orthogonal', 'rescaled' or 'svd_segments'.",
    "lora_bias": "experts have no bias of their own; leave it out.",
    "use_dora": "use kind='dora': each expert has magnitudes of its own (`molora kinds list` names all kinds).",
    "target_parameters": "experts go on modules, not on parameters: target linear layers, or adapt fused experts with PEFT's"
    " LoraConfig(target_parameters=...) in a model of its own.",
    "alora_invocation_tokens": "which experts act is the gate's part: use tasks, or gate.scope='task'.",
    "arrow_config": "use molora.compose(base, loras, fit='arrow').",
    "use_bdlora": _BY_PEFT,
    "corda_config": "use init='svd_segments', which starts from the base weight too.",
    "eva_config": "use init='svd_segments', which starts from the base weight too.",
    "kasa_config": _BY_PEFT,
    "loftq_config": "load a quantised base; experts start at zero on it.",
    "lora_ga_config": "use init='svd_segments', which starts from the base weight too.",
    "megatron_config": _BY_PEFT,
    "megatron_core": _BY_PEFT,
    "monteclora_config": _BY_PEFT,
    "qalora_group_size": _BY_PEFT,
    "use_qalora": _BY_PEFT,
    "runtime_config": _BY_PEFT,
    "velora_config": _BY_PEFT,
}
"""By name: what to do instead. All fields of LoraConfig that ours lacks; their defaults, which ask for nothing, pass."""

_FOUND_OUT = {"fan_in_fan_out"}  # seen from the layer, whatever is said


def refusing(init: Callable[..., None], ours: frozenset[str]) -> Callable[..., None]:
    """A config's `__init__` that explains the fields of LoraConfig it does not have; others are Python's TypeError."""

    @wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **_without_lora_fields(settings, ours))

    return checked


def _without_lora_fields(settings: Mapping[str, Any], ours: frozenset[str]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name in ours}
    if len(kept) == len(settings):
        return kept
    defaults = {f.name: getattr(LoraConfig(), f.name) for f in fields(LoraConfig)}
    for name, value in settings.items():
        if name in ours or name in _FOUND_OUT:
            continue
        if name not in defaults:
            kept[name] = value
        elif value != defaults[name]:
            raise ConfigError(
                f"{name} is a setting of PEFT's LoraConfig, which MoLoraConfig does not have.",
                hint=INSTEAD.get(name, _BY_PEFT),
            )
    return kept

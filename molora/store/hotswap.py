"""Swap the weights of an adapter in place: another one of the same form, without a new model or new Parameters."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from molora.disk.atomic import recover
from molora.disk.base_check import check_base
from molora.disk.card import WEIGHTS_FILE
from molora.errors import ConfigError
from molora.forward.mount import MountPoint
from molora.store.adapter import active_adapter, peft_model, read_config
from molora.tuner.loan import own
from molora.tuner.scale import configured_scalings, set_scalings

_NOTES = {
    "auto_mapping", "base_fingerprint", "base_model_name_or_path", "depth", "inference_mode", "peft_version", "revision",
    "task_type", "weights_sha256",
}  # fmt: skip
_SWAPPED = {"alpha_pattern", "lora_alpha", "scaling", "use_rslora"}


def hotswap(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Put a saved adapter's experts, gates and heads in the place of one in the model, and take its scalings.

    The Parameters stay the same objects, so that a compiled model is not compiled again and an optimiser goes on.

    Raises:
        ConfigError: the saved adapter has another form (other experts, ranks, targets, gate); the fields are named.
        AdapterError: a damaged folder, or an adapter of another base.
    """
    wrapped = peft_model(model)
    name = active_adapter(wrapped, adapter_name)
    folder = recover(path)
    new, now = read_config(folder), wrapped.peft_config[name]
    other = _differences(new, now)
    if other:
        raise ConfigError(
            f"{folder} is an adapter of another form; it differs in {', '.join(other)}.",
            hint=f"load it beside: model.load_adapter(path, 'other'), then model.delete_adapter({name!r}).",
        )
    check_base(new.base_fingerprint, wrapped)
    points = [m for m in wrapped.modules() if isinstance(m, MountPoint) and name in m.mounts]
    config = own(wrapped.get_base_model(), points[0].context, name)
    config.base_fingerprint, config.weights_sha256 = new.base_fingerprint, new.weights_sha256
    set_peft_model_state_dict(wrapped, load_file(folder / WEIGHTS_FILE), adapter_name=name)
    for field in _SWAPPED:
        setattr(config, field, getattr(new, field))
    for point in points:
        set_scalings(point.mounts[name], configured_scalings(point.mounts[name]))


def _differences(new: Any, now: Any) -> list[str]:
    """Settings of the two that a swap would have to change, beyond scalings."""
    one, other = new.to_dict(), now.to_dict()
    names = {f.name for f in fields(new)} - _NOTES - _SWAPPED
    return sorted(name for name in names if one.get(name) != other.get(name))

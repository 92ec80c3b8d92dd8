"""preset: the MoLoraConfig of a published method. The methods themselves are in `molora.config.presets`."""

from __future__ import annotations

from typing import Any

from molora.config.presets import PRESETS, preset_settings
from molora.tuner.config import MoLoraConfig


def preset(name: str, **overrides: Any) -> MoLoraConfig:
    """The MoLoraConfig of a published method, with any field overridden.

    Args:
        name: one of `list_presets()`; `molora presets show NAME` prints what it sets and where it deviates.
        overrides: fields of MoLoraConfig. A `gate` map without `kind` replaces single fields of the gate.

    Raises:
        ConfigError: no preset of that name; the message lists those that exist.
    """
    return MoLoraConfig(**{"target_modules": "all-linear", **preset_settings(name, overrides)})


def list_presets() -> list[str]:
    """Names of all presets."""
    return sorted(PRESETS)

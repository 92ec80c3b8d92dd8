"""Puts "MOLORA" into PEFT's tables, so that PEFT's own functions find it."""

from __future__ import annotations

from typing import Any

from peft import mapping

from molora.tuner.config import MoLoraConfig, MoLoraPeftType
from molora.tuner.model import MoLoraModel


def register() -> None:
    """Register the method; calling it again changes nothing.

    PEFT's `register_peft_method` accepts only members of its own enum, but its tables are plain dicts. A
    `str` enum of ours hashes and compares as "MOLORA", which is what an adapter_config.json holds.
    """
    key: Any = MoLoraPeftType.MOLORA
    if mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(key) not in (None, MoLoraModel):
        raise RuntimeError("another package has already registered a PEFT method named MOLORA")
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = MoLoraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = MoLoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = MoLoraModel.prefix

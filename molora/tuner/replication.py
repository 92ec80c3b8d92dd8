"""Blocks that are used several times: a deeper model of shared weights, with experts of its own at every use."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import replicate_layers
from torch import nn

from molora.disk.fingerprint import base_fingerprint
from molora.errors import ConfigError
from molora.forward.mount import MountPoint
from molora.tuner.config import MoLoraConfig


def replicated(config: MoLoraConfig) -> dict[str, Any] | None:
    """The fingerprint of the base before its blocks were copied, where they were."""
    return config.__dict__.get("_replicated") if config.layer_replication is not None else None


def replicate(config: MoLoraConfig, model: nn.Module) -> None:
    """Give a base the blocks of `layer_replication`, and note whose they are: the base before that.

    Raises:
        ConfigError: the model has adapters already, or no list of blocks that PEFT knows.
    """
    if any(isinstance(module, MountPoint) for module in model.modules()):
        raise ConfigError(
            "layer_replication builds a model of its own, but this one has an adapter already.",
            hint="put an adapter with layer_replication on a base alone.",
        )
    assert config.layer_replication is not None
    config.__dict__["_replicated"] = base_fingerprint(model)
    try:
        replicate_layers(model, [(start, end) for start, end in config.layer_replication])
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"layer_replication: {error}") from error

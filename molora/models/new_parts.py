"""What a checkpoint lacks of its model: begun the same way at every load, and trained and saved with the adapter."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from molora.errors import ConfigError

log = logging.getLogger(__name__)

_NEW = "_molora_new_parts"  # attribute of a base: names of its modules that its checkpoint lacks
_HEADS = ("classifier", "score")
"""Heads of classifiers: new for every task, and saved with every adapter by PEFT."""


def begin_new_parts(model: Any, missing: Iterable[str], what: str) -> None:
    """Begin the modules of these parameters from a seed of their own, and note them for `saved_with`.

    Left as transformers begins them, they would be others at each load.

    Raises:
        ConfigError: a parameter is not one of a layer, so that nothing could be saved whole.
    """
    names = sorted({key.rpartition(".")[0] for key in missing})
    new = [name for name in names if not any(part in _HEADS for part in name.split("."))]
    for name in new:
        module = model.get_submodule(name)
        if not name or any(True for _ in module.children()):
            raise ConfigError(
                f"base.model: the checkpoint of {what!r} lacks parameters of {name or 'the model'}, which cannot be saved "
                "with an adapter.",
                hint="name a checkpoint that is complete for this task type, or save the base with these parameters first.",
            )
        _begin(model, name, module)
    if new:
        log.warning("the checkpoint of %r lacks %s: trained and saved with the adapter", what, ", ".join(new))
    setattr(model, _NEW, tuple(new))


def saved_with(model: nn.Module, given: Iterable[str] | None) -> list[str] | None:
    """The modules that an adapter on this base trains and saves whole: those given, and what the checkpoint lacks."""
    new = [name for name in getattr(model, _NEW, ()) if not any(name.endswith(g) for g in given or ())]
    return [*(given or ()), *new] or None


@torch.no_grad()
def _begin(model: Any, name: str, module: nn.Module) -> None:
    for part in (module, *module.parameters(), *module.buffers()):
        if hasattr(part, "_is_hf_initialized"):
            part._is_hf_initialized = False
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(zlib.crc32(name.encode()))
        model._init_weights(module)

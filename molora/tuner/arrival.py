"""Weights that transformers' own loaders bring, which tell no method of PEFT of it: compared with those that were saved."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from molora.disk.tensors import adapter_tensors, changed, digest
from molora.tuner.config import MoLoraConfig

_SAVED_AS = (torch.float32, torch.bfloat16, torch.float16)


def check_arrived(model: nn.Module, config: MoLoraConfig, adapter: str) -> None:
    """Compare the digest of a saved adapter with the tensors that were assigned by name, if any were; once.

    A loader may have cast them. What was widened is narrowed again; what was narrowed can not be compared.

    Raises:
        AdapterError: they are not the ones that were saved.
    """
    stored = config.weights_sha256
    if stored is None or not any(module.__dict__.get("assigned") for module in model.modules()):
        return
    config.weights_sha256 = None
    tensors = adapter_tensors(model, adapter)
    narrowed = any(tensor.dtype in _SAVED_AS[1:] for tensor in tensors.values())
    found = digest(tensors, adapter)
    if found in (stored, None) or narrowed or _as_saved(tensors, adapter, stored):
        return
    config.weights_sha256 = stored
    raise changed(stored, found)


def _as_saved(tensors: dict[str, Tensor], adapter: str, stored: str) -> bool:
    """Whether experts and gates, each in one of the dtypes that they may have been saved in, have the digest."""
    for experts, gates in product(_SAVED_AS, _SAVED_AS):
        cast: Any = {
            name: t.to(experts if "molora_experts" in name else gates) for name, t in tensors.items()
        }
        if digest(cast, adapter) == stored:
            return True
    return False

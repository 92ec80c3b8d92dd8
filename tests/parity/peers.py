"""What the parity tests share: molora models on the tiny Llama, and PEFT's LoRA layers by module name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from molora import MoLoraConfig
from molora.experts.bank import Expert
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model

OPTIONS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LINEARS = 14  # of the two blocks: q, k, v, o, gate, up, down


def base(dtype: torch.dtype = torch.float64) -> Any:
    """The same frozen tiny Llama at every call."""
    return base_model("llama", dtype=dtype)


def molora_on_llama(*, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A molora model with three experts over all linears, in eval mode; gradients stay enabled."""
    torch.manual_seed(1)
    return get_peft_model(base(dtype), MoLoraConfig(**{"num_experts": 3, **OPTIONS, **settings})).eval()


def molora_layers(model: nn.Module) -> dict[str, MoLoraLayer]:
    """molora's layers by their module name in the base."""
    found = {m.mounts["default"].key: m for m in model.modules() if isinstance(m, MoLoraLayer)}
    assert len(found) == LINEARS
    return found


def peer_layers(model: nn.Module, attribute: str) -> dict[str, Any]:
    """PEFT's adapted layers, those with that attribute, by module name in the base."""
    found = {
        "model.layers." + name.rpartition("model.layers.")[2]: m
        for name, m in model.named_modules()
        if hasattr(m, attribute)
    }
    assert len(found) == LINEARS
    return found


@torch.no_grad()
def fill(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor], seed: int, std: float = 0.3) -> None:
    """Give tensors random values, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std)


def lora_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every A and B of a model with PEFT LoRAs."""
    return (p for name, p in model.named_parameters() if ".lora_" in name)


def save_loras(folder: Path, ranks: Sequence[int], alphas: Sequence[float], dtype: torch.dtype) -> list[str]:
    """LoRA adapters of random factors on disk, one folder for each rank."""
    paths = []
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        model = get_peft_model(base(dtype), LoraConfig(r=r, lora_alpha=alpha, **OPTIONS))
        fill(lora_tensors(model), seed=10 + i)
        model.save_pretrained(folder / f"lora_{i}")
        paths.append(str(folder / f"lora_{i}"))
    return paths


@torch.no_grad()
def copy_loras(peer: nn.Module, model: nn.Module, adapters: Sequence[str]) -> None:
    """Make the PEFT adapters of these names the experts of a molora model, in that order."""
    theirs = peer_layers(peer, "lora_A")
    for key, layer in molora_layers(model).items():
        lora = theirs[key]
        experts = [
            Expert(lora.lora_A[a].weight.clone(), lora.lora_B[a].weight.clone(), lora.scaling[a])
            for a in adapters
        ]
        bank = layer.molora_experts["default"]
        assert bank.ranks == tuple(e.rank for e in experts)
        assert_close(bank.scalings, tuple(e.scaling for e in experts))  # the config says the same
        bank.assign(experts, [False] * len(experts))


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs are far enough apart for their comparison with a third to mean something."""
    return bool((a - b).abs().amax() > 0.05)

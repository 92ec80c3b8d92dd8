"""Noise in training: on the logits, or on what the gate reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """What `add(values, std)` returns stands for the values; neither the values nor their shape change."""

    add: Callable[[Tensor, float], Tensor]
    on_input: bool = False  # the values are what the gate reads, not its logits


def gaussian(logits: Tensor, std: float) -> Tensor:
    """Plus N(0, std²)."""
    return logits + torch.randn_like(logits) * std


def jitter(x: Tensor, std: float) -> Tensor:
    """Times U(1 - std, 1 + std); a copy, since the experts read x as it is."""
    return x * torch.empty_like(x).uniform_(1 - std, 1 + std)


def gumbel(logits: Tensor, std: float) -> Tensor:
    """Plus Gumbel noise times std."""
    return logits - (-_uniform(logits).log()).log() * std


def logistic(logits: Tensor, std: float) -> Tensor:
    """Plus logistic noise times std; with a sigmoid a relaxed Bernoulli."""
    return logits + torch.logit(_uniform(logits)) * std


def _uniform(values: Tensor) -> Tensor:
    return torch.rand_like(values).clamp(1e-7, 1 - 1e-7)


GAUSSIAN, GUMBEL, LOGISTIC = Noise(gaussian), Noise(gumbel), Noise(logistic)
JITTER = Noise(jitter, on_input=True)

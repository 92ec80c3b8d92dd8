"""How the rows of a gate start: how they are spread, and how widely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molora.config.choices import STARTS
from molora.config.gate import GateSettings


def started(settings: GateSettings, *shape: int, width: int | None = None) -> Tensor:
    """Numbers of that shape as the gate's `init` and `init_std` say; `width`: of what a row is multiplied by (its own)."""
    drawn: Tensor = STARTS[settings.init](shape, std_of(settings, width or shape[-1]))
    return drawn


def std_of(settings: GateSettings, width: int) -> float:
    """The standard deviation of rows that multiply `width` numbers."""
    std = settings.init_std
    return 1 / math.sqrt(3 * width) if isinstance(std, str) else std


def normal(shape: tuple[int, ...], std: float) -> Tensor:
    """N(0, std²)."""
    return torch.randn(shape) * std


def uniform(shape: tuple[int, ...], std: float) -> Tensor:
    """Uniform around 0 with that standard deviation: within ±√3 of it."""
    return (torch.rand(shape) * 2 - 1) * (std * math.sqrt(3))

"""How an expert's `A` starts (its `B` starts at zero), and what standard deviation that implies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

INIT_KINDS = ("kaiming", "gaussian", "rescaled", "orthogonal")


def expected_std(kind: str, d_in: int, r: int, std: float = 0.02, gain: float = 1.0) -> float:
    """Standard deviation that `init_A` gives the entries of `A` (r, d_in)."""
    if kind == "kaiming":
        return gain / math.sqrt(3 * d_in)
    if kind == "gaussian":
        return gain * std
    if kind == "rescaled":
        return gain * std / math.sqrt(r)
    return gain / math.sqrt(max(d_in, r))


@torch.no_grad()
def init_A(A: Tensor, kind: str = "kaiming", std: float = 0.02, gain: float = 1.0) -> Tensor:
    """Initialise `A` (r, d_in) in place and return it.

    `kaiming` is PEFT's default (uniform, std 1/√(3·d_in), independent of r); `gaussian` is N(0, std²);
    `rescaled` is N(0, std²/r), so that Var(BA) of two random factors does not grow with r;
    `orthogonal` has orthonormal rows. `gain` multiplies each of them.
    """
    r, d_in = A.shape
    if kind == "kaiming":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A.mul_(gain)
    if kind == "orthogonal":
        return nn.init.orthogonal_(A, gain=gain)
    return A.normal_(std=expected_std(kind, d_in, r, std, gain))


def low_rank(delta: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of `delta` (d_out, d_in): `A` (r, d_in) and `B` (d_out, r), B·A ≈ delta."""
    U, S, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
    root = S[:r].sqrt()
    A, B = root.unsqueeze(1) * Vh[:r], U[:, :r] * root
    short = r - root.numel()  # r may exceed min(d_out, d_in)
    return nn.functional.pad(A, (0, 0, 0, short)), nn.functional.pad(B, (0, short))

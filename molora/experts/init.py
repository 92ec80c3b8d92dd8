"""How an expert's `A` starts (its `B` starts at zero), and what standard deviation that implies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

INIT_KINDS = ("kaiming", "gaussian", "rescaled", "orthogonal", "svd_segments")


def expected_std(kind: str, d_in: int, r: int, std: float = 0.02, gain: float = 1.0) -> float:
    """Standard deviation that `init_A` gives the entries of `A` (r, d_in)."""
    if kind in ("kaiming", "svd_segments"):
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
    `orthogonal` has orthonormal rows. `gain` multiplies each of them. Experts that join a mixture made with
    `svd_segments` start as with kaiming.
    """
    r, d_in = A.shape
    if kind in ("kaiming", "svd_segments"):
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A.mul_(gain)
    if kind == "orthogonal":
        return nn.init.orthogonal_(A, gain=gain)
    return A.normal_(std=expected_std(kind, d_in, r, std, gain))


@torch.no_grad()
def svd_segments(
    weight: Tensor, ranks: Sequence[int], scalings: Sequence[float], rho: float = 10.0
) -> list[tuple[Tensor, Tensor]]:
    """Factors of each expert from equally spaced segments of the singular vectors of a weight.

    Segment i begins at vector `i · (vectors // experts)`, or so early that it has the expert's rank.
    `scaling · B A` is the segment's part of the weight over rho. A is (rank, d_in), B (d_out, rank); the base
    weight stays as it is. Reference: GOAT, arXiv:2502.16894.

    Args:
        weight: (d_out, d_in).
        ranks: of each expert.
        scalings: of each expert.
        rho: how much smaller than the weight its segments are taken.
    """
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    step, factors = len(S) // len(ranks), []
    for i, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
        start = min(i * step, max(len(S) - rank, 0))
        part = slice(start, start + rank)
        root = (S[part] / (scaling * rho)).sqrt()
        A, B, short = root.unsqueeze(1) * Vh[part], U[:, part] * root, rank - len(root)
        factors.append((nn.functional.pad(A, (0, 0, 0, short)), nn.functional.pad(B, (0, short))))
    return factors

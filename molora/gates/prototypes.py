"""Prototypes (expert, d_in) a gate can score inputs against: from an expert's factors or from its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from einops import rearrange
from torch import Tensor

from molora.errors import RoutingError
from molora.experts.bank import Expert

_TIE = 1e-6  # entries this close to the largest count as equally large, so rounding cannot flip the sign


@torch.no_grad()
def arrow(experts: Sequence[Expert]) -> Tensor:
    """Top right singular vector of each expert's `B A`, (expert, d_in): Arrow, arXiv:2405.11157.

    Exact, in float64, without the product: with `Aᵀ = Q R` and `B = P S` the singular values are those of `S Rᵀ`
    (rank, rank). The sign, which is open, makes the largest entry positive; the scaling does not enter. Where the two
    largest singular values are equal, the vector is one of many. Rows have length 1, or 0 where `B A` is zero; they are
    float64 if any factor is, else float32.
    """
    dtypes = [factor.dtype for expert in experts for factor in (expert.A, expert.B)]
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    return torch.stack([_top_right(expert).to(expert.A.device, dtype) for expert in experts])


class MeanActivation:
    """Streaming mean of the inputs each expert is meant for; `rows` is (expert, d_in)."""

    def __init__(self, num_experts: int, d_in: int, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros(num_experts, d_in, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_experts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, expert: int, mask: Tensor | None = None) -> None:
        """Count `x` (..., d_in) towards one expert, or only the tokens where `mask` (...) is not zero."""
        num_experts, d_in = self.sums.shape
        if not 0 <= expert < num_experts:
            raise RoutingError(f"expert {expert} does not exist; allowed: 0 to {num_experts - 1}.")
        if x.shape[-1] != d_in or (mask is not None and mask.shape != x.shape[:-1]):
            found = f"x {tuple(x.shape)}" + ("" if mask is None else f" and mask {tuple(mask.shape)}")
            wanted = f"x (..., {d_in}) and a mask of x's leading shape"
            raise RoutingError(f"{found} do not fit; expected {wanted}.")
        tokens = rearrange(_wide(x), "... d_in -> (...) d_in")
        count = torch.tensor(float(tokens.shape[0]), dtype=torch.float64)
        if mask is not None:
            keep = mask.to(tokens.device).bool().flatten()
            # Not a product: whatever padding holds, even what is not finite, must not enter.
            tokens = tokens.masked_fill(~keep.unsqueeze(1), 0)
            count = keep.sum(dtype=torch.float64)
        self.sums[expert] += tokens.sum(0, dtype=torch.float64).to(self.sums.device)
        self.counts[expert] += count.to(self.counts.device)

    def rows(self) -> Tensor:
        """Mean input of each expert, (expert, d_in) float32; zero for experts that saw no token."""
        return (self.sums / self.counts.clamp(min=1).unsqueeze(1)).float()


def _top_right(expert: Expert) -> Tensor:
    """Unit top right singular vector (d_in,) of one expert's product, float64; zero if that is zero."""
    Q, R = torch.linalg.qr(_wide(expert.A).double().t())
    S = torch.linalg.qr(_wide(expert.B).double()).R
    _, values, rows = torch.linalg.svd(S @ R.t())
    rounding = torch.finfo(torch.float64).eps * expert.rank * S.norm() * R.norm()
    row = Q @ rows[0]
    size = row.abs()
    largest = (size >= size.max() * (1 - _TIE)).to(torch.uint8).argmax()
    return torch.where(values[0] > rounding, row * row[largest].sign(), 0.0)


def _wide(x: Tensor) -> Tensor:
    """x on a device that has float64, which Apple's GPUs have not."""
    return x.cpu() if x.device.type == "mps" else x

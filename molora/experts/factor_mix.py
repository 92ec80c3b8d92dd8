"""Experts mixed by their factors: one LoRA `(Σ g s B)(Σ g A)` for each sample, instead of a sum of outputs.

Another function than the sum of outputs: it has cross terms B_i A_j. Only for weights that are the same for all
tokens of a sample, so that one pair of factors serves them all.

Reference: Polytropon, arXiv:2202.13914; with splits, MHR, arXiv:2211.03831.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from molora.errors import RoutingError
from molora.experts.bank import Expert, ExpertBank
from molora.experts.kernel import linear_dtype


def mixed(
    bank: ExpertBank, weights: Tensor, experts: tuple[int, ...] | None = None, splits: int = 1
) -> tuple[Tensor, Tensor]:
    """Each sample's factors: `A` (sample, rank, d_in) and `B` (sample, d_out, rank), scalings in B.

    Args:
        bank: the layer's experts.
        weights: (samples * splits, expert) over the columns of `experts`.
        experts: indices the columns stand for; None = all.
        splits: parts that d_in and d_out are cut into; each has weights of its own.
    """
    chosen = bank.experts() if experts is None else [bank.expert(i) for i in experts]
    dtype = torch.promote_types(weights.dtype, chosen[0].A.dtype)
    by_split = rearrange(weights.to(dtype), "(n splits) expert -> n splits expert", splits=splits)
    scalings = by_split.new_tensor([e.scaling for e in chosen])
    A = _cut([e.A for e in chosen], splits, by_split.dtype)
    B = _cut([e.B.t() for e in chosen], splits, by_split.dtype)
    mixed_A = einsum(by_split, A, "n splits expert, expert rank splits d -> n rank splits d")
    mixed_B = einsum(by_split * scalings, B, "n splits expert, expert rank splits d -> n rank splits d")
    return (
        rearrange(mixed_A, "n rank splits d -> n rank (splits d)"),
        rearrange(mixed_B, "n rank splits d -> n (splits d) rank"),
    )


def add_mixed(
    bank: ExpertBank,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    experts: tuple[int, ...] | None = None,
    splits: int = 1,
) -> Tensor:
    """`y + B̄ Ā drop(x)` with each sample's own factors.

    Args:
        bank: the layer's experts.
        x: (batch, ..., d_in); the batch may be a multiple of the samples, each repeated in place.
        y: (batch, ..., d_out).
        weights: (samples * splits, expert), or (splits, expert) for one mixture that serves everything.
        experts: indices the columns stand for.
        splits: see `mixed`.
    """
    A, B = mixed(bank, weights, experts, splits)
    dtype = linear_dtype(x)
    x = bank.dropout(x)
    if len(A) == 1:
        return y + F.linear(F.linear(x.to(dtype), A[0].to(dtype)), B[0].to(dtype)).to(y.dtype)
    if x.shape[0] % len(A):
        raise RoutingError(
            f"experts mixed by their factors have weights for {len(A)} samples, but the batch has {x.shape[0]}."
        )
    repeats = x.shape[0] // len(A)
    flat = x.reshape(x.shape[0], -1, x.shape[-1]).to(dtype)
    A, B = (part.to(dtype).repeat_interleave(repeats, dim=0) for part in (A, B))
    return y + (flat @ A.mT @ B.mT).to(y.dtype).reshape(y.shape)


def mixed_delta(bank: ExpertBank, weights: Tensor) -> Tensor:
    """Weight update (d_out, d_in) of one static mixture; weights (splits, expert)."""
    A, B = mixed(bank, weights, splits=len(weights))
    return B[0] @ A[0]


def _cut(factors: Sequence[Tensor], splits: int, dtype: torch.dtype) -> Tensor:
    """(rank, d) of every expert as one (expert, rank, splits, d/splits); shorter ranks padded with zeros."""
    rank = max(len(factor) for factor in factors)
    stacked = torch.stack([F.pad(f.to(dtype), (0, 0, 0, rank - len(f))) for f in factors])
    return rearrange(stacked, "expert rank (splits d) -> expert rank splits d", splits=splits)


def as_one(bank: ExpertBank, weights: Tensor) -> Expert:
    """A static mixture of factors as one expert of scaling 1; weights (splits, expert)."""
    A, B = mixed(bank, weights, splits=len(weights))
    return Expert(A[0], B[0], 1.0)

"""Subspaces of what layers read: streaming covariances, the span that holds most of their energy, overlaps. Pure maths."""

from __future__ import annotations

import torch
from torch import Tensor


def grown_basis(basis: Tensor | None, covariance: Tensor, energy: float) -> Tensor:
    """The smallest extension (d, k') of a basis (d, k) that holds a share `energy`, 0 to 1, of a covariance's trace.

    The columns of the basis are orthonormal and stay the first ones; None has none. The covariance (d, d) is the sum
    of x xᵀ. Reference: the gradient projection memory that InfLoRA (CVPR 2024) uses, with energies of inputs (eigenvalues)
    where its code squares them. Its dual form only changes what is stored.
    """
    covariance = covariance.double()
    d = len(covariance)
    old = covariance.new_zeros(d, 0) if basis is None else basis.to(covariance)
    total = covariance.trace()
    held = (old * (covariance @ old)).sum()
    room = d - old.shape[1]
    if held >= energy * total or room == 0:
        return old
    values, vectors = torch.linalg.eigh(residual(old, covariance))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    reached = held + values.cumsum(0)
    count = min(int((reached < energy * total - 1e-12 * total).sum()) + 1, room)
    added = torch.linalg.qr(without(vectors[:, :count].t(), old).t()).Q
    return torch.cat([old, added], dim=1)


def residual(basis: Tensor | None, covariance: Tensor) -> Tensor:
    """A covariance (d, d) without what lies in a basis (d, k): `P C P` with `P = I - M Mᵀ`."""
    covariance = covariance.double()
    if basis is None or basis.shape[1] == 0:
        return covariance
    M = basis.to(covariance)
    left = covariance - M @ (M.t() @ covariance)
    both = left - (left @ M) @ M.t()
    return (both + both.t()) / 2


def leading(covariance: Tensor, count: int, floor: float = 0.0) -> Tensor:
    """The `count` directions (count, d) of most energy, orthonormal rows; zero rows where it is `floor` or less."""
    values, vectors = torch.linalg.eigh(covariance.double())
    alive = values.flip(0)[:count] > floor
    return (vectors.flip(1)[:, :count] * alive).t().contiguous()


def without(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Rows (n, d) without their part in the basis (d, k)."""
    if basis is None or basis.shape[1] == 0:
        return rows
    M = basis.to(rows)
    return rows - (rows @ M) @ M.t()


def overlap(A: Tensor, B: Tensor) -> float:
    """How much of the smaller row space lies in the other: mean squared cosine of principal angles, 0 to 1.

    A and B are (rank, d); rows need not be orthogonal, nor independent. 0 where one has no direction at all.
    """
    first, second = (_span(rows.detach().double()) for rows in (A, B))
    smaller = min(len(first), len(second))
    return float((first @ second.t()).square().sum() / smaller) if smaller else 0.0


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows (k, d) with the span of the given ones; k is their rank."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    floor = max(rows.shape) * torch.finfo(torch.float32).eps * sizes.max()
    return directions[sizes > floor]

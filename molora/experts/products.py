"""Product: an expert's weight update as two factors, and what leaves the product as it is or nearly so.

Nothing here, and no method of fusion, looks at a factor alone: B R and R^-1 A are the same expert for every R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from molora.experts.kinds.kind import Expert


class Product(NamedTuple):
    """The update `B A` of one linear layer, any scaling multiplied in: `B` (d_out, rank), `A` (rank, d_in)."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def matrix(self) -> Tensor:
        """(d_out, d_in)."""
        return self.B @ self.A


class Cut(NamedTuple):
    """A product of at most some rank, and what that cost: the squared norm of what was cut off, and of the whole."""

    product: Product
    lost: float
    whole: float


def stacked(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """`sum_i w_i B_i A_i` exactly, the factors side by side: its rank is the sum of the ranks."""
    B = torch.cat([w * p.B for w, p in zip(weights, products, strict=True)], dim=1)
    return Product(B, torch.cat([p.A for p in products]))


def balanced(product: Product) -> Product:
    """The same product by its singular values, B = U sqrt(S) and A = sqrt(S) V^T; without forming it."""
    return truncated(product, product.rank).product


def truncated(product: Product, rank: int) -> Cut:
    """The nearest product of at most `rank` in the Frobenius norm (Eckart and Young), balanced; without forming it."""
    Q_B, R_B = torch.linalg.qr(product.B)
    Q_A, R_A = torch.linalg.qr(product.A.mT)
    cut = factored(R_B @ R_A.mT, rank)
    return cut._replace(product=Product(Q_B @ cut.product.B, cut.product.A @ Q_A.mT))


def factored(matrix: Tensor, rank: int) -> Cut:
    """The nearest product of at most `rank` to a matrix (d_out, d_in), balanced."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root, energy = S[:rank].sqrt(), S.square()
    product = Product(U[:, :rank] * root, root[:, None] * Vh[:rank])
    return Cut(product, float(energy[rank:].sum()), float(energy.sum()))


@torch.no_grad()
def weighed(
    experts: Sequence[Expert], weights: Sequence[float], rank: int, scaling: float, *, shares_A: bool = False
) -> Expert:
    """The expert of this rank and scaling that is nearest to the weighted sum of the updates of others, in their dtype.

    Exact from the sum of their ranks on, and where they share one A, which stays as it is.
    """
    if shares_A:
        parts = [w * e.scaling / scaling * e.B for w, e in zip(weights, experts, strict=True)]
        return Expert(experts[0].A, torch.stack(parts).sum(dim=0), scaling)
    dtype = experts[0].A.dtype
    compute = torch.promote_types(dtype, torch.float32)
    products = [Product(e.B.to(compute) * (e.scaling / scaling), e.A.to(compute)) for e in experts]
    B, A = truncated(stacked(products, weights), rank).product
    short = rank - len(A)  # it may exceed the sum of the ranks, and the sizes of the layer
    return Expert(pad(A, (0, 0, 0, short)).to(dtype), pad(B, (0, short)).to(dtype), scaling)

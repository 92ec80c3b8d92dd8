"""Whether a machine multiplies small matrices bit for bit as the one that wrote the fixtures did."""

from __future__ import annotations

import hashlib

import torch
from torch.nn import functional

ROWS, INNER, OUTER = (1, 3, 7, 21, 56), (2, 3, 4, 6, 16, 32), (1, 2, 3, 4, 6, 8, 16, 32)


def digest_of_small_products(pool: torch.Tensor) -> str:
    """SHA-256 of products in the shapes that experts and gates have, forward and backward.

    The bases alone do not tell: a matmul library may choose another kernel for these shapes and the same one for the
    bases' own. The factors are cut from `pool`, stored float32 numbers (1,792 or more), because generators of random
    numbers differ between machines too.
    """
    flat = pool.flatten()

    def cut(*shape: int) -> torch.Tensor:
        return flat[: torch.Size(shape).numel()].view(shape)

    seen = hashlib.sha256()
    for rows in ROWS:
        for inner in INNER:
            for outer in OUTER:
                x, weight, grad = cut(rows, inner), cut(outer, inner), cut(rows, outer)
                for product in (functional.linear(x, weight), grad.T @ x, grad @ weight):
                    seen.update(product.contiguous().numpy().tobytes())
    for value in (
        functional.normalize(cut(21, 16), dim=-1),
        cut(21, 3).softmax(-1),
        functional.silu(cut(21, 32)),
    ):
        seen.update(value.contiguous().numpy().tobytes())
    return seen.hexdigest()

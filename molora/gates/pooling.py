"""Pool the tokens of a sample into the one vector a gate of sequence scope reads."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor


def pool(x: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """One vector per sample, (batch, d), in float32 or better.

    Args:
        x: (batch, seq, d); (batch, d) is pooled already.
        mask: (batch, seq) true for the tokens that count; a sample without any has the vector 0.
        kind: "mean" of them, the "last" of them, or the "first" (a CLS token).
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.dim() == 2:
        return exact
    if mask is None:
        return exact.mean(dim=1) if kind == "mean" else exact[:, -1 if kind == "last" else 0]
    if kind == "mean":
        kept = mask.to(exact.dtype)
        total = einsum(exact, kept, "batch seq d, batch seq -> batch d")
        return total / kept.sum(dim=1, keepdim=True).clamp(min=1)
    order = torch.arange(mask.shape[1], device=mask.device)
    place = (order * mask).argmax(dim=1) if kind == "last" else mask.int().argmax(dim=1)
    rows = torch.arange(len(exact), device=mask.device)
    return exact[rows, place] * mask.any(dim=1, keepdim=True)

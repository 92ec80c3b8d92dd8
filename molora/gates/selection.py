"""Select and renormalise: from gate scores to expert weights."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_weights(scores: Tensor, k: int, renorm: str | None) -> Tensor:
    """Weights (tokens, expert) that are zero outside each token's k best experts.

    Args:
        scores: (tokens, expert); -inf forbids an expert.
        k: experts per token, at most as many as there are.
        renorm: "sum" divides the kept softmax probabilities by their sum, which is the softmax over the kept
            scores alone; otherwise the kept probabilities stay as they are.
    """
    k = min(k, scores.shape[-1])
    if renorm == "sum":
        best, indices = scores.topk(k, dim=-1)
        values = best.softmax(dim=-1)
    else:
        values, indices = scores.softmax(dim=-1).topk(k, dim=-1)
    return torch.zeros_like(scores).scatter_(-1, indices, values)

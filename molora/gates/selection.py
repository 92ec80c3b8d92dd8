"""Select and renormalise: from gate probabilities to expert weights."""

from __future__ import annotations

import torch
from torch import Tensor


def select_top_k(probs: Tensor, k: int) -> Tensor:
    """Mask (tokens, expert) of the k largest probabilities of each token."""
    indices = probs.topk(min(k, probs.shape[-1]), dim=-1).indices
    return torch.zeros_like(probs).scatter_(-1, indices, 1.0)


def renormalise_sum(weights: Tensor) -> Tensor:
    """Divide each token's weights by their sum."""
    return weights / weights.sum(dim=-1, keepdim=True)

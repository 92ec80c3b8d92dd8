"""Auxiliary losses: pure functions of one gate's routing or of expert factors."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of `values` (tokens, ...) where `mask` (tokens,) is true; 0 if it never is."""
    if mask is None:
        return values.mean(dim=0)
    kept = mask.to(values.dtype)
    return einsum(values, kept, "tokens ..., tokens -> ...") / kept.sum().clamp(min=1)


def balance(probs: Tensor, selected: Tensor, mask: Tensor | None = None) -> Tensor:
    """Load balance of one gate: `expert · Σ_e f_e P_e`, 1 at uniform whatever k, larger at collapse.

    `f_e` is the fraction of routed slots that expert e received (no gradient), `P_e` its mean
    probability. A dense gate selects every expert for every token; its `f_e` is the mean weight.

    Args:
        probs: (tokens, expert) gate probabilities before selection.
        selected: (tokens, expert) share of the token's slots given to each expert; rows sum to 1.
        mask: (tokens,) true for tokens that count.

    Reference: Switch Transformer, arXiv:2101.03961, per gate instead of pooled over layers, and f
    normalised by k so that one coefficient means the same for every k.
    """
    fraction = masked_mean(selected.detach(), mask)
    return probs.shape[-1] * (fraction * masked_mean(probs, mask)).sum()


def z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of router logits (tokens, expert). Reference: ST-MoE, arXiv:2202.08906."""
    return masked_mean(torch.logsumexp(logits, dim=-1).square(), mask)


def orthogonal(new: Tensor, old: Tensor, norm: str = "l1") -> Tensor:
    """Overlap of the new experts' `A` with the frozen ones': Σ|A_old A_newᵀ| or Σ(A_old A_newᵀ)².

    Args:
        new: (rank_new, d_in) rows of the experts being trained.
        old: (rank_old, d_in) rows of the frozen experts; gets no gradient.
        norm: "l1" (the form O-LoRA's authors run) or "squared" (the form printed in the paper).

    Reference: O-LoRA, arXiv:2310.14152.
    """
    overlap = einsum(old.detach(), new, "old d_in, new d_in -> old new")
    return overlap.abs().sum() if norm == "l1" else overlap.square().sum()

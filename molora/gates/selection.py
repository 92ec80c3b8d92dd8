"""Transform, select, renormalise: from gate scores to expert weights. Pure functions of (tokens, expert)."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(scores: Tensor, transform: str) -> Tensor:
    """Scores to weights of all experts: "softmax", "sigmoid" (divided by its sum), "identity", or "gain".

    Gain is `|2 sigmoid(4 score) - 1|` (GainLoRA, arXiv:2505.15424): 0 for a score of 0, near 1 for one of ±1.

    A score of -inf forbids an expert: its weight is 0.
    """
    if transform == "softmax":
        return scores.softmax(dim=-1)
    if transform == "sigmoid":
        gates = scores.sigmoid()
        return gates / gates.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    if transform == "gain":
        return (2 * (4 * scores).sigmoid() - 1).abs().masked_fill(scores == float("-inf"), 0.0)
    return scores.masked_fill(scores == float("-inf"), 0.0)


def top_k_weights(
    scores: Tensor, k: int, renorm: str | None, transform: str = "softmax", balance: Tensor | None = None
) -> Tensor:
    """Weights (tokens, expert) that are zero outside each token's k best experts.

    Args:
        scores: (tokens, expert); -inf forbids an expert.
        k: experts per token, at most as many as there are.
        renorm: "softmax" takes the softmax over the kept scores alone; "sum" divides the kept weights by their
            sum, which is the same for softmax probabilities; otherwise they stay as they are.
        transform: see `probabilities`.
        balance: (expert,) added to the probabilities for the choice alone, not for the weights.
    """
    k = min(k, scores.shape[-1])
    if balance is not None:
        return _balanced(scores, k, renorm, transform, balance)
    if renorm == "softmax" or (renorm == "sum" and transform == "softmax"):
        best, indices = scores.topk(k, dim=-1)
        values = best.softmax(dim=-1)
    else:
        weights = probabilities(scores, transform)
        # Scores that are weights may be below the 0 of a forbidden expert.
        indices = (scores if transform == "identity" else weights).topk(k, dim=-1).indices
        values = weights.gather(-1, indices)
        if renorm == "sum":
            values = _over_sum(values)
    return torch.zeros_like(scores).scatter_(-1, indices, values)


def _balanced(scores: Tensor, k: int, renorm: str | None, transform: str, balance: Tensor) -> Tensor:
    probs = probabilities(scores, transform)
    biased = probs.detach() + balance.to(probs.dtype)
    indices = biased.masked_fill(scores == float("-inf"), float("-inf")).topk(k, dim=-1).indices
    if renorm == "softmax":
        values = scores.gather(-1, indices).softmax(dim=-1)
    else:
        values = probs.gather(-1, indices)
        values = _over_sum(values) if renorm == "sum" else values
    return torch.zeros_like(scores).scatter_(-1, indices, values)


def top_p_weights(probs: Tensor, p: float, min_k: int, renorm: str | None) -> Tensor:
    """Keep the most probable experts until they make up p, the one that crosses it included, at least min_k.

    Reference: top-p routing of MixLoRA-dynamic and DynMoLE (arXiv:2504.00661).
    """
    return _kept(probs, _nucleus(probs, p, min_k), renorm)


def threshold_weights(probs: Tensor, threshold: Tensor | float, renorm: str | None) -> Tensor:
    """`relu(probs - threshold)`; a token below it everywhere has no expert at all.

    Args:
        probs: (tokens, expert).
        threshold: a number, or (tokens, 1).
        renorm: "sum" divides by the sum where it is not zero.

    Reference: AdaMoLE, arXiv:2405.00361.
    """
    weights = (probs - threshold).relu()
    return _over_sum(weights) if renorm == "sum" else weights


def entropy_weights(
    probs: Tensor,
    p: float,
    min_k: int,
    switch: float,
    index: float,
    renorm: str | None,
    choices: Tensor | None = None,
) -> Tensor:
    """All experts for tokens the gate is unsure about, `top_p_weights` for the others.

    Unsure: the Tsallis entropy of `index` (1: Shannon's), over its largest value, is above `switch`. `choices`: see
    `relative_entropy`.
    Reference: DynMoLE, arXiv:2504.00661.
    """
    unsure = relative_entropy(probs, index, choices) > switch
    return _kept(probs, _nucleus(probs, p, min_k) | unsure.unsqueeze(-1), renorm)


def relative_entropy(probs: Tensor, index: float = 1.0, choices: Tensor | None = None) -> Tensor:
    """Tsallis entropy (tokens,) of `index` over that of a uniform choice; 1 is Shannon's; 0 for one expert.

    `choices`: (tokens,) how many experts each token may use, where that is not all of them.
    """
    if choices is None:
        choices = probs.new_full((1,), probs.shape[-1])
    choices = choices.to(probs.dtype)
    if index == 1.0:
        found, largest = torch.special.entr(probs).sum(dim=-1), choices.log()
    else:
        found, largest = 1 - probs.pow(index).sum(dim=-1), 1 - choices ** (1 - index)
    return torch.where(choices > 1, found / torch.where(choices > 1, largest, 1.0), 0.0)


def hard_weights(probs: Tensor) -> Tensor:
    """One-hot at the largest; its gradient is that of the probabilities (straight-through)."""
    index = probs.argmax(dim=-1, keepdim=True)
    one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    return one_hot + (probs - probs.detach())


def _nucleus(probs: Tensor, p: float, min_k: int) -> Tensor:
    best, indices = probs.sort(dim=-1, descending=True)
    before = best.cumsum(dim=-1) - best  # what the better experts already make up
    kept = (before < p) | (torch.arange(probs.shape[-1], device=probs.device) < min_k)
    return torch.zeros_like(kept).scatter_(-1, indices, kept)


def _kept(probs: Tensor, kept: Tensor, renorm: str | None) -> Tensor:
    weights = probs * kept
    return _over_sum(weights) if renorm == "sum" else weights


def _over_sum(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

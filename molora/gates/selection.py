"""Transform, select, renormalise: from gate scores to expert weights. Pure functions of (tokens, expert).

A transform turns scores into the weights of all experts. A selection turns scores into the weights of the chosen ones:
`select(scores, how)`, with all else it may look at in `how`. In scores -inf forbids an expert: its weight is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from molora.config.choices import TRANSFORMS
from molora.config.gate import GateSettings
from molora.gates.entropies import relative_entropy

Transform = Callable[[Tensor], Tensor]


class How(NamedTuple):
    """What a selection may look at beside the scores (tokens, expert)."""

    settings: GateSettings
    transform: Transform
    top_k: int  # experts per token, in this layer
    renorm: str | None  # kept weights: "sum" over their sum, "softmax" of their scores, else as they are
    threshold: Tensor | float | None = None  # (tokens, 1), or one for all
    balance: Tensor | None = None  # (expert,) added to the probabilities for the choice, not for the weights
    allowed: Tensor | None = None  # (tokens, expert) bool, where not every token may use all of the experts


Selection = Callable[[Tensor, How], Tensor]


def softmax(scores: Tensor) -> Tensor:
    """The softmax over the experts."""
    return scores.softmax(dim=-1)


def sigmoid(scores: Tensor) -> Tensor:
    """Sigmoids, divided by their sum."""
    return _over_sum(scores.sigmoid())


def identity(scores: Tensor) -> Tensor:
    """The scores themselves."""
    return scores.masked_fill(scores == float("-inf"), 0.0)


def gain(scores: Tensor) -> Tensor:
    """`|2 sigmoid(4 score) - 1|` (GainLoRA, arXiv:2505.15424): 0 for a score of 0, near 1 for one of ±1."""
    return (2 * (4 * scores).sigmoid() - 1).abs().masked_fill(scores == float("-inf"), 0.0)


def probabilities(scores: Tensor, transform: str) -> Tensor:
    """Weights of all experts, by the name of the transform."""
    return TRANSFORMS[transform](scores)


def dense(scores: Tensor, how: How) -> Tensor:
    """All experts."""
    return how.transform(scores)


def top_k(scores: Tensor, how: How) -> Tensor:
    """Weights that are zero outside each token's k best experts, or of all where there are fewer."""
    k, transform = min(how.top_k, scores.shape[-1]), how.settings.transform
    if how.balance is not None:
        return _balanced(scores, k, how, how.balance)
    if how.renorm == "softmax" or (how.renorm == "sum" and transform == "softmax"):  # which are the same
        best, indices = scores.topk(k, -1)
        values = best.softmax(-1)
    else:
        weights = how.transform(scores)
        # Scores that are weights may be below the 0 of a forbidden expert.
        indices = (scores if transform == "identity" else weights).topk(k, dim=-1).indices
        values = _renormalised(weights.gather(-1, indices), how)
    return torch.zeros_like(scores).scatter_(-1, indices, values)


def _balanced(scores: Tensor, k: int, how: How, balance: Tensor) -> Tensor:
    probs = how.transform(scores)
    biased = probs.detach() + balance.to(probs.dtype)
    indices = biased.masked_fill(scores == float("-inf"), float("-inf")).topk(k, dim=-1).indices
    if how.renorm == "softmax":
        values = scores.gather(-1, indices).softmax(dim=-1)
    else:
        values = _renormalised(probs.gather(-1, indices), how)
    return torch.zeros_like(scores).scatter_(-1, indices, values)


def top_p(scores: Tensor, how: How) -> Tensor:
    """Keep the most probable experts until they make up p, the one that crosses it included, at least min_k.

    Reference: top-p routing of MixLoRA-dynamic and DynMoLE (arXiv:2504.00661).
    """
    probs = how.transform(scores)
    return _renormalised(probs * _nucleus(probs, how), how)


def threshold(scores: Tensor, how: How) -> Tensor:
    """`relu(probs - threshold)`; a token below it everywhere has no expert at all.

    Reference: AdaMoLE, arXiv:2405.00361.
    """
    assert how.threshold is not None  # the config filled it in
    return _renormalised((how.transform(scores) - how.threshold).relu(), how)


def entropy(scores: Tensor, how: How) -> Tensor:
    """All experts for tokens the gate is unsure about, `top_p` for the others.

    Unsure: the entropy, over its largest value among the allowed experts, is above `entropy_threshold`.
    Reference: DynMoLE, arXiv:2504.00661.
    """
    probs, settings = how.transform(scores), how.settings
    choices = None if how.allowed is None else how.allowed.sum(dim=-1)
    found = relative_entropy(probs, settings.entropy_index, choices, settings.entropy_form)
    unsure = (found > settings.entropy_threshold).unsqueeze(-1)
    return _renormalised(probs * (_nucleus(probs, how) | unsure), how)


def hard(scores: Tensor, how: How) -> Tensor:
    """One-hot at the largest; its gradient is that of the probabilities (straight-through)."""
    probs = how.transform(scores)
    index = probs.argmax(dim=-1, keepdim=True)
    one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    return one_hot + (probs - probs.detach())


def _nucleus(probs: Tensor, how: How) -> Tensor:
    best, indices = probs.sort(dim=-1, descending=True)
    before = best.cumsum(dim=-1) - best  # what the better experts already make up
    first = torch.arange(probs.shape[-1], device=probs.device) < how.settings.min_k
    kept = (before < how.settings.top_p) | first
    return torch.zeros_like(kept).scatter_(-1, indices, kept)


def _renormalised(weights: Tensor, how: How) -> Tensor:
    return _over_sum(weights) if how.renorm == "sum" else weights


def _over_sum(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

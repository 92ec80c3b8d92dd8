"""Gate: score, noise, transform, select, renormalise; returns a Routing over experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from molora.experts.kernel import scores as exact_scores
from molora.gates import selection
from molora.gates.scores import GateRows


@dataclass
class Routing:
    """A gate's answer. Columns stand for `experts` (indices), or for all experts where that is None."""

    weights: Tensor  # (tokens, expert) or (1, expert): what the experts' outputs are multiplied by
    experts: tuple[int, ...] | None = None
    logits: Tensor | None = None  # (tokens, expert) float32; None where nothing is learned
    scores: Tensor | None = None  # (tokens, expert) what is transformed; -inf where forbidden
    transform: str = "softmax"
    dense: bool = False  # every expert is selected, its weight is its probability

    @property
    def probs(self) -> Tensor:
        """Probabilities (tokens, expert) before selection; computed when asked for, as losses and statistics do."""
        if self.dense or self.scores is None:
            return self.weights
        return selection.probabilities(self.scores, self.transform)

    @property
    def selected(self) -> Tensor:
        """Share (tokens, expert) of the token's slots given to each expert; rows sum to 1, no gradient."""
        if self.dense:
            return self.weights.detach()
        chosen = (self.weights.detach() != 0).to(self.weights.dtype)
        return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)


class GateSettings(Protocol):
    """The fields of GateConfig a gate reads."""

    scope: str
    score: str
    transform: str
    select: str
    top_k: int
    top_p: float
    min_k: int
    threshold: float | None
    entropy_threshold: float
    entropy_index: float
    renorm: str | None
    temperature: float
    noise: str | None
    noise_std: float

    @property
    def alone_is_one(self) -> bool: ...


class Gate(nn.Module):
    """A learned gate: `transform((score + noise) / temperature)`, then select, then renormalise.

    Arithmetic is float32 whatever the autocast dtype (float64 for float64 inputs). Noise is drawn in
    training only. It reads the tokens it is given and nothing else: no other sample, no later token.

    `rows` has one row per expert, `bias` one number per expert; `hidden` (score "mlp") and `threshold` (a
    learned one) serve all experts, and are frozen once experts are.
    """

    def __init__(
        self,
        settings: GateSettings,
        rows: GateRows,
        *,
        bias: GateRows | None = None,
        hidden: nn.Linear | None = None,
        threshold: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.rows = rows
        self.bias = bias
        self.hidden = hidden
        self.threshold = threshold
        self.frozen_shared = False
        self._direct = settings.scope == "token" and settings.score != "mlp"

    @property
    def grown(self) -> list[GateRows]:
        """Everything that has one entry per expert."""
        return [self.rows] if self.bias is None else [self.rows, self.bias]

    @property
    def scores_x(self) -> bool:
        """Whether its logits begin with the products of its rows and x itself, which others may compute for it."""
        return self._direct and not (self.training and self.settings.noise == "jitter")

    def apply_freeze(self) -> None:
        """Frozen parts stay frozen, whatever marked the adapter as trainable."""
        for rows in self.grown:
            rows.apply_freeze()
        if self.frozen_shared:
            for part in (self.hidden, self.threshold):
                if part is not None:
                    part.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        *,
        products: Tensor | None = None,
        experts: tuple[int, ...] | None = None,
        allowed: Tensor | None = None,
    ) -> Routing:
        """Route x.

        Args:
            x: (tokens, d_in).
            products: (tokens, expert) products of the rows and x, where `scores_x` and somebody computed them.
            experts: restrict the gate to these expert indices for every token, renormalised over them.
            allowed: (tokens, expert) bool, the same per token; rows must allow at least one expert.
        """
        settings = self.settings
        if products is not None and settings.score == "linear" and self.bias is None:
            logits = products
        else:
            logits = self._logits(x, products)
        if experts is not None and len(experts) < logits.shape[-1]:
            logits = logits[:, list(experts)]
        if settings.noise is not None and self.training:
            logits = self._noisy(logits)
        scores = logits if settings.temperature == 1.0 else logits / settings.temperature
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = self._select(x, scores)
        return Routing(weights, experts, logits, scores, settings.transform, dense=settings.select == "dense")

    def static_weights(self) -> Tensor:
        """Weights (expert,) of a gate that reads nothing."""
        return self.forward(self.rows.weight.new_zeros(1, 1)).weights[0]

    def _logits(self, x: Tensor, products: Tensor | None) -> Tensor:
        settings = self.settings
        if settings.scope == "constant":
            return self.rows.table()
        if settings.noise == "jitter" and self.training:  # on a copy: the experts read x as it is
            x = x * torch.empty_like(x).uniform_(1 - settings.noise_std, 1 + settings.noise_std)
        if self.hidden is not None:
            inner = exact_scores(x, [self.hidden.weight])
            products = self.rows.logits((inner + self.hidden.bias.to(inner.dtype)).relu())
        elif products is None:
            products = self.rows.logits(x)
        if settings.score == "cosine":
            lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=products.dtype)
            rows = torch.linalg.vector_norm(self.rows.weight, dim=-1, dtype=products.dtype)
            products = products / (lengths * rows).clamp_min(torch.finfo(products.dtype).tiny)
        return products if self.bias is None else products + self.bias.table().to(products.dtype)

    def _noisy(self, logits: Tensor) -> Tensor:
        noise, std = self.settings.noise, self.settings.noise_std
        if noise == "gaussian":
            return logits + torch.randn_like(logits) * std
        if noise == "jitter":  # is on x already
            return logits
        uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
        if noise == "gumbel":
            return logits - (-uniform.log()).log() * std
        return logits + torch.logit(uniform) * std

    def _select(self, x: Tensor, scores: Tensor) -> Tensor:
        settings = self.settings
        if settings.select == "top_k":
            return selection.top_k_weights(scores, settings.top_k, settings.renorm, settings.transform)
        probs = selection.probabilities(scores, settings.transform)
        if settings.select == "dense":
            return probs
        if settings.select == "hard":
            return selection.hard_weights(probs)
        if settings.select == "threshold":
            return selection.threshold_weights(probs, self._threshold(x), settings.renorm)
        if settings.select == "top_p":
            return selection.top_p_weights(probs, settings.top_p, settings.min_k, settings.renorm)
        return selection.entropy_weights(
            probs, settings.top_p, settings.min_k, settings.entropy_threshold, settings.entropy_index, settings.renorm
        )  # fmt: skip

    def _threshold(self, x: Tensor) -> Tensor | float:
        """The threshold in use: fixed, or `sigmoid(w x + b)` times the largest one, (tokens, 1)."""
        largest = self.settings.threshold
        assert largest is not None  # the config filled it in
        if self.threshold is None:
            return largest
        score = exact_scores(x, [self.threshold.weight])
        return largest * (score + self.threshold.bias.to(score.dtype)).sigmoid()

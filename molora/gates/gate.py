"""Gate: score, noise, transform, select, renormalise; returns a Routing over experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from molora.gates.scores import GateRows
from molora.gates.selection import top_k_weights


@dataclass
class Routing:
    """A gate's answer. Columns stand for `experts` (indices), or for all experts where that is None."""

    weights: Tensor  # (tokens, expert) or (1, expert): what the experts' outputs are multiplied by
    experts: tuple[int, ...] | None = None
    logits: Tensor | None = None  # (tokens, expert) float32; None where nothing is learned
    scores: Tensor | None = None  # (tokens, expert) what the softmax is taken of; -inf where forbidden
    dense: bool = False  # every expert is selected, its weight is its probability

    @property
    def probs(self) -> Tensor:
        """Probabilities (tokens, expert) before selection; computed when asked for, as losses and statistics do."""
        return self.weights if self.dense or self.scores is None else self.scores.softmax(dim=-1)

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
    select: str
    top_k: int
    renorm: str | None
    temperature: float
    noise: str | None
    noise_std: float


class Gate(nn.Module):
    """A learned gate: `softmax((score + noise) / temperature)`, then select, then renormalise.

    Arithmetic is float32 whatever the autocast dtype (float64 for float64 inputs). Noise is drawn in
    training only. It reads the tokens it is given and nothing else: no other sample, no later token.
    """

    def __init__(self, settings: GateSettings, rows: GateRows) -> None:
        super().__init__()
        self.settings = settings
        self.rows = rows

    def forward(
        self,
        x: Tensor,
        *,
        logits: Tensor | None = None,
        experts: tuple[int, ...] | None = None,
        allowed: Tensor | None = None,
    ) -> Routing:
        """Route x.

        Args:
            x: (tokens, d_in).
            logits: (tokens, expert) router logits of x, where they are known already.
            experts: restrict the gate to these expert indices for every token, renormalised over them.
            allowed: (tokens, expert) bool, the same per token; rows must allow at least one expert.
        """
        settings = self.settings
        if settings.scope == "constant":
            logits = self.rows.table()
        elif logits is None:
            logits = self.rows.logits(x)
        if experts is not None and len(experts) < logits.shape[-1]:
            logits = logits[:, list(experts)]
        if settings.noise == "gaussian" and self.training:
            logits = logits + torch.randn_like(logits) * settings.noise_std
        scores = logits if settings.temperature == 1.0 else logits / settings.temperature
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        if settings.select == "dense":
            return Routing(scores.softmax(dim=-1), experts, logits, scores, dense=True)
        weights = top_k_weights(scores, settings.top_k, settings.renorm)
        return Routing(weights, experts, logits, scores)

    def static_weights(self) -> Tensor:
        """Weights (expert,) of a gate that reads nothing."""
        return self.forward(self.rows.weight.new_zeros(1, 1)).weights[0]

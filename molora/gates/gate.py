"""Gate: score, noise, transform, select, renormalise; returns a Routing over experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from molora.gates.scores import GateRows
from molora.gates.selection import renormalise_sum, select_top_k


@dataclass
class Routing:
    """A gate's answer. Columns stand for `experts` (indices), or for all experts where that is None."""

    weights: Tensor  # (tokens, expert) or (1, expert): what the experts' outputs are multiplied by
    experts: tuple[int, ...] | None = None
    logits: Tensor | None = None  # (tokens, expert) float32; None where nothing is learned
    probs: Tensor | None = None  # (tokens, expert) before selection
    selected: Tensor | None = None  # (tokens, expert) share of the token's slots; rows sum to 1


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
        self, x: Tensor, *, experts: tuple[int, ...] | None = None, allowed: Tensor | None = None
    ) -> Routing:
        """Route x.

        Args:
            x: (tokens, d_in).
            experts: restrict the gate to these expert indices for every token, renormalised over them.
            allowed: (tokens, expert) bool, the same per token; rows must allow at least one expert.
        """
        settings = self.settings
        logits = self.rows.table() if settings.scope == "constant" else self.rows.logits(x)
        if experts is not None:
            logits = logits[:, list(experts)]
        with torch.autocast(x.device.type, enabled=False):
            if settings.noise == "gaussian" and self.training:
                logits = logits + torch.randn_like(logits) * settings.noise_std
            scores = logits / settings.temperature
            if allowed is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))
            probs = scores.softmax(dim=-1)
            weights, selected = self._select(probs)
        return Routing(weights, experts, logits, probs, selected)

    def _select(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and slot shares, each (tokens, expert)."""
        if self.settings.select == "dense":
            return probs, probs
        chosen = select_top_k(probs, self.settings.top_k)
        weights = probs * chosen
        if self.settings.renorm == "sum":
            weights = renormalise_sum(weights)
        return weights, chosen / chosen.sum(dim=-1, keepdim=True)

    def static_weights(self) -> Tensor:
        """Weights (expert,) of a gate that reads nothing."""
        return self.forward(self.rows.weight.new_zeros(1, 1)).weights[0]

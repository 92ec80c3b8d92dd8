"""GateRows: one row per expert or task, in blocks that stay as they are when more are added."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.experts.kernel import scores
from molora.experts.stack import Stack


class GateRows(Stack):
    """One row per expert: a vector (d_in,) for a linear score, a scalar (one per split) for a table.

    The same class holds one row per task, for gates that learn from the task id. Blocks are in the order in which
    experts were added, and each is multiplied on its own, so the logits of earlier experts are bit-equal however
    many come later.
    """

    def set_weight(self, weight: Tensor) -> None:
        """Write all rows in place, given in expert order."""
        self.fill(weight)

    def logits(self, x: Tensor) -> Tensor:
        """Linear scores in float32 (float64 for float64 x): (tokens, d_in) -> (tokens, expert)."""
        return self.in_order(scores(x, self.blocks))

    def table(self) -> Tensor:
        """Scores that read nothing: (1, expert), or (1, splits * expert), in float32 or better."""
        weight = self.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight.t().reshape(1, -1)

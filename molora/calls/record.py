"""GateRecord: what one gate decided in one forward, for losses and statistics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from molora.calls.task_map import TaskMap
from molora.gates.gate import Routing


@dataclass
class GateRecord:
    """What one gate decided in one forward; kept only while losses or statistics need it."""

    routing: Routing
    lead: tuple[int, ...]  # (batch, seq) of the layer's input
    mask: Tensor | None  # (tokens,) true where a token counts
    response: Tensor | None  # (tokens,) true where a token counts and has a label
    task_ids: Tensor | None  # (tokens,)
    task_map: TaskMap  # the layer's
    top_k: int  # the gate's
    x: Tensor | None = None  # (*lead, d_in) the layer's input without its graph, where a loss needs it

    @property
    def columns(self) -> tuple[int, ...]:
        """The experts that the columns of `routing.decided` stand for."""
        found = self.gated if self.gated is not None else tuple(range(len(self.task_map.experts)))
        used = self.routing.experts
        return found if used is None else tuple(i for i in used if i in found)

    @property
    def gated(self) -> tuple[int, ...] | None:
        """The experts its columns stand for, where some are always on and not among them."""
        return self.task_map.gated if self.routing.gated is not None else None

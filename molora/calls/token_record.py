"""TokenRecord: every gate's weights for every token of one short text, where sums are not enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.calls.statistics import RoutingRecord, by_token, full_weights
from molora.calls.task_map import TaskMap


@dataclass
class TokenRecord(RoutingRecord):
    """`weights`: gate -> (tokens, expert) over all experts, of the last forward; for a batch of one sample."""

    weights: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, task_map: TaskMap, records: list[tuple[str, Any]]) -> None:
        self.experts = task_map.experts
        for gate, record in records:
            here = [task_map.experts.index(name) for name in record.task_map.experts]
            weights, _, _ = full_weights(record.routing, here, len(task_map.experts))
            weights = by_token(weights, record.lead)
            if record.mask is not None:  # virtual tokens are none of the text's
                weights = weights[record.mask]
            self.weights[gate] = weights.float().cpu()

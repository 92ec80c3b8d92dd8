"""Prompts: the virtual tokens of an adapter's experts in its model, and the weights that each sample gives them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molora.calls.call import Call
from molora.calls.context import AdapterRouting
from molora.calls.decide import experts_in_use, route
from molora.calls.record import GateRecord
from molora.calls.task_ids import TaskIds, spread
from molora.errors import RoutingError
from molora.experts.virtual_tokens import VirtualTokens
from molora.gates.gate import Gate, Routing

PROMPTS = "prompts"
"""What stands for a module's name where the prompts' gate is recorded, and where settings go by module."""


class Prompts(nn.Module):
    """One adapter's virtual tokens. What precedes a sample is known before the model's first block.

    So a learned gate of scope sequence reads the embedded prompt here, where those of the layers read their inputs.

    Args:
        tokens: of the experts.
        gate: of the prompts alone; None where task ids decide, or one gate serves the whole model.
    """

    def __init__(self, tokens: VirtualTokens, gate: Gate | None) -> None:
        super().__init__()
        self.tokens, self.gate = tokens, gate
        # The one gate of the whole model; in a tuple, because it is a part of its layer, not of this module.
        self.shared: tuple[Gate, ...] = ()

    def of_samples(self, adapter: str, found: AdapterRouting, call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors (batch, tokens, d_model) before each sample, and whether it has any (batch,).

        None precede a sample that asks for the base alone, or whose experts all have weight 0.

        Args:
            adapter: whose prompts they are.
            found: what calls know of it.
            call: as it is before anything precedes x.
            x: (batch, seq, d_model) the embedded samples.

        Raises:
            RoutingError: weights that are not one per sample, or task ids that are needed and were not given.
        """
        tasks, batch = call.tasks.get(adapter), x.shape[0]
        if tasks is not None and tasks.ids.dim() != 1:
            raise RoutingError("virtual tokens need one task id per sample, not per token.")
        routing = self._routing(adapter, found, call, x, tasks)
        if len(routing.weights) > batch:
            raise RoutingError(
                "virtual tokens need one vector of routing features per sample, (batch, d), not one per token."
            )
        weights = spread(routing.weights, (batch,)).expand(batch, -1)
        if tasks is not None and tasks.some_base:
            weights = weights * tasks.asked(torch.Size([batch]), weights.device)
        return self.tokens.mixed(weights, routing.experts), (weights != 0).any(dim=-1).to(x.device)

    def _routing(
        self, adapter: str, found: AdapterRouting, call: Call, x: Tensor, tasks: TaskIds | None
    ) -> Routing:
        settings, task_map, lead = found.config.gate, found.task_map, x.shape[:-1]
        gate = next(iter(self.shared), self.gate)
        experts = experts_in_use(task_map, tasks, call, settings)
        routing = route(x, gate, task_map, tasks, call, experts, by_sample=True)
        if call.recording and self.gate is not None:
            call.cache.records[adapter, PROMPTS] = GateRecord(
                routing,
                tuple(lead),
                call.mask("decoder", lead),
                call.response("decoder", lead),
                None if tasks is None else tasks.expand(lead),
                task_map,
                self.gate.top_k,
                x.detach(),
            )
        return routing

    def apply_freeze(self) -> None:
        """What is frozen stays frozen, whatever marked the adapter as trainable."""
        self.tokens.apply_freeze()
        if self.gate is not None:
            self.gate.apply_freeze()

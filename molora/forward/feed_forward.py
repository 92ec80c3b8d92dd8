"""Mixtures over whole feed-forward blocks: experts meet after the non-linearity, not linear by linear (MixLoRA).

`y = Σ_slot w_slot · FFN_e(slot)(x)`, every linear of FFN_e being the frozen one plus expert e's LoRA. The block's code
stays as it is: its first linears compute the frozen part once and return one copy of the batch for each slot, what
lies between them works row by row, and the last linear adds the copies up again. So the first linears cost what
they always cost, the last one costs as much per slot as without experts.

Reference: MixLoRA, arXiv:2404.15159.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum, rearrange
from torch import Tensor

from molora.calls.call import base_only, spread
from molora.errors import ConfigError, RoutingError
from molora.experts.kernel import expand
from molora.forward.group_routing import experts_of, routing_of

if TYPE_CHECKING:
    from molora.tuner.layer import MoLoraLayer


@dataclass
class Slots:
    """What the first linear of a feed-forward decided for all of them."""

    weights: Tensor  # (tokens, slot), rows sum to 1
    chosen: Tensor  # (slot * tokens, expert) one-hot; a zero row is the frozen feed-forward
    experts: tuple[int, ...] | None  # what the columns stand for
    lead: tuple[int, ...]  # (batch, ...) of the block's input


def mix(layer: MoLoraLayer, adapter: str, x: Tensor, y: Tensor) -> Tensor:
    """One linear of a mixed feed-forward: x (batch, ..., d_in) and its frozen output y (batch, ..., d_out).

    Returns:
        (slot * batch, ..., d_out) from the first linears, (batch, ..., d_out) from the last.

    Raises:
        RoutingError: the last linear is not called with what the first ones returned.
    """
    site, led = layer.sites[adapter], layer.context.state.led
    name = f"{adapter} {site.feed_forward}"
    if site.leaves:
        return _leave(layer, adapter, x, y, led.get(name))
    slots = _slots(layer, adapter, x)
    led[name] = slots
    bank = layer.molora_experts[adapter]
    operands = bank.operands(slots.experts, x)
    count = slots.weights.shape[1]
    copies, h = y.repeat(count, *[1] * (y.dim() - 1)), bank.shrunk(x, operands).repeat(count, 1)
    return expand(copies, h, slots.chosen, operands.expansion, operands.B)


def check_feed_forwards(layers: list[MoLoraLayer], adapter: str) -> None:
    """Raise ConfigError where a feed-forward has one linear only, which nothing lies behind."""
    for layer in layers:
        site = layer.sites.get(adapter)
        if site is not None and site.leaves and site.group[0] is layer:
            raise ConfigError(
                f"ffn_targets: {site.key} is alone in its block; a feed-forward has at least two linears.",
                hint="name all linears of the feed-forward, such as gate_proj, up_proj and down_proj.",
            )


def _slots(layer: MoLoraLayer, adapter: str, x: Tensor) -> Slots:
    """The experts of each token, one per slot, with weights that sum to 1."""
    context, lead = layer.context, x.shape[:-1]
    gate, tasks = context.adapters[adapter].config.gate, context.state.tasks.get(adapter)
    experts = experts_of(layer, adapter)
    routing = routing_of(layer, adapter, x, experts)
    weights = spread(routing.weights, lead).expand(math.prod(lead), -1)
    if tasks is not None and tasks.single is None and tasks.has_base:
        weights = weights * base_only(tasks.expand(lead).to(x.device))
    columns = weights.shape[1]
    chosen_by_gate = routing.logits is not None
    count = columns
    if chosen_by_gate and gate.select in ("top_k", "hard"):
        always = 0 if routing.gated is None else columns - routing.gated.shape[1]
        best = 1 if gate.select == "hard" else layer.gate_of(adapter).top_k  # type: ignore[union-attr]
        count = min(columns, best + always)
    values, index = weights.topk(count, dim=-1)
    total = weights.sum(dim=-1, keepdim=True)
    nobody = total == 0  # asked for the base only, or no expert passed the threshold: the frozen block
    values = torch.where(nobody, 1 / count, values / total.masked_fill(nobody, 1.0))
    chosen = torch.nn.functional.one_hot(index, columns).to(weights.dtype) * ~nobody.unsqueeze(-1)
    return Slots(
        values, rearrange(chosen, "tokens slot expert -> (slot tokens) expert"), experts, tuple(lead)
    )


def _leave(layer: MoLoraLayer, adapter: str, x: Tensor, y: Tensor, slots: Slots | None) -> Tensor:
    key = layer.sites[adapter].key
    if slots is None or math.prod(x.shape[:-1]) != len(slots.chosen):
        raise RoutingError(
            f"{key} ends a mixed feed-forward, but is not called with what the first linears of it returned.",
            hint="call the model as a whole; name only linears of one feed-forward block in ffn_targets.",
        )
    y = layer.molora_experts[adapter](x, y, slots.chosen, slots.experts)
    by_slot = rearrange(
        y.reshape(-1, y.shape[-1]), "(slot tokens) d_out -> slot tokens d_out", slot=slots.weights.shape[1]
    )
    mixed = einsum(by_slot, slots.weights.to(y.dtype), "slot tokens d_out, tokens slot -> tokens d_out")
    return mixed.to(y.dtype).reshape(*slots.lead, y.shape[-1])

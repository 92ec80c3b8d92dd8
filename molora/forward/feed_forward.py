"""Mixtures over whole feed-forward blocks: experts meet after the non-linearity, not linear by linear (MixLoRA).

`y = Σ_slot w_slot · FFN_e(slot)(x)`, every linear of FFN_e being the frozen one plus expert e's LoRA. The block's code
stays as it is: its first linears compute the frozen part once and return one copy of the batch for each slot, what
lies between them works row by row, and the last linear adds the copies up again. So the first linears cost what
they always cost, the last one costs as much per slot as without experts.

Reference: MixLoRA, arXiv:2404.15159.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from torch import Tensor

from molora.calls.call import Call, Slots
from molora.calls.task_ids import spread
from molora.errors import ConfigError, RoutingError
from molora.experts.kernel import expand
from molora.forward.group_routing import routing_alone
from molora.forward.mount import Mount


def mix(mount: Mount, call: Call, x: Tensor, y: Tensor) -> Tensor:
    """One linear of a mixed feed-forward: x (batch, ..., d_in) and its frozen output y (batch, ..., d_out).

    Returns:
        (slot * batch, ..., d_out) from the first linears, (batch, ..., d_out) from the last.

    Raises:
        RoutingError: the last linear is not called with what the first ones returned.
    """
    assert mount.feed_forward is not None
    place = mount.adapter, mount.feed_forward
    if mount.leaves:
        return _leave(mount, x, y, call.cache.slots.get(place))
    slots = call.cache.slots[place] = _slots(mount, call, x)
    operands, count = mount.bank.operands(slots.experts, x), slots.weights.shape[1]
    copies, h = y.repeat(count, *[1] * (y.dim() - 1)), mount.bank.shrunk(x, operands).repeat(count, 1)
    return expand(copies, h, slots.chosen, operands.expansion, operands.B)


def check_feed_forwards(mounts: list[Mount]) -> None:
    """Raise ConfigError where a feed-forward has one linear only, which nothing lies behind."""
    for mount in mounts:
        if mount.leaves and mount.leader is mount:
            raise ConfigError(
                f"ffn_targets: {mount.key} is alone in its block; a feed-forward has at least two linears.",
                hint="name all linears of the feed-forward, such as gate_proj, up_proj and down_proj.",
            )


def refuse_beside_others(mounts: list[Mount]) -> None:
    """Raise ConfigError where a mixed feed-forward is one of several adapters at a layer."""
    if any(mount.feed_forward is not None for mount in mounts):
        raise ConfigError(
            "a mixture over whole feed-forwards cannot be added to another adapter's; activate one of them."
        )


def _slots(mount: Mount, call: Call, x: Tensor) -> Slots:
    """The experts of each token, one per slot, with weights that sum to 1."""
    lead, tasks, experts = x.shape[:-1], mount.tasks(call), mount.experts(call)
    routing = routing_alone(mount, call, x, experts)
    weights = spread(routing.weights, lead).expand(math.prod(lead), -1)
    if tasks is not None and tasks.some_base:
        weights = weights * tasks.asked(lead, x.device)
    columns = count = weights.shape[1]
    select, gate = mount.config.gate.select, mount.leader.gate
    if routing.logits is not None and gate is not None and select in ("top_k", "hard"):
        always = 0 if routing.gated is None else columns - routing.gated.shape[1]
        count = min(columns, (1 if select == "hard" else gate.top_k) + always)
    values, index = weights.topk(count, dim=-1)
    total = weights.sum(dim=-1, keepdim=True)
    nobody = total == 0  # asked for the base only, or no expert passed the threshold: the frozen block
    values = torch.where(nobody, 1 / count, values / total.masked_fill(nobody, 1.0))
    chosen = torch.nn.functional.one_hot(index, columns).to(weights.dtype) * ~nobody.unsqueeze(-1)
    return Slots(
        values, rearrange(chosen, "tokens slot expert -> (slot tokens) expert"), experts, tuple(lead)
    )


def _leave(mount: Mount, x: Tensor, y: Tensor, slots: Slots | None) -> Tensor:
    if slots is None or math.prod(x.shape[:-1]) != len(slots.chosen):
        raise RoutingError(
            f"{mount.key} ends a mixed feed-forward, but is not called with what the first linears of it returned.",
            hint="call the model as a whole; name only linears of one feed-forward block in ffn_targets.",
        )
    y = mount.bank(x, y, slots.chosen, slots.experts)
    by_slot = rearrange(
        y.reshape(-1, y.shape[-1]), "(slot tokens) d_out -> slot tokens d_out", slot=slots.weights.shape[1]
    )
    mixed = einsum(by_slot, slots.weights.to(y.dtype), "slot tokens d_out, tokens slot -> tokens d_out")
    return mixed.to(y.dtype).reshape(*slots.lead, y.shape[-1])

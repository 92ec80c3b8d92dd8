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
from torch.nn import functional as F

from molora.calls.call import Slots
from molora.calls.task_ids import spread
from molora.errors import ConfigError, RoutingError
from molora.experts import by_sample, by_token
from molora.experts.kernel import expand
from molora.experts.picks import Picks, ordered, picked, scale_of
from molora.forward.dispatch import way_of
from molora.forward.mount import Mount
from molora.forward.reading import Reading
from molora.forward.sparse import chosen, rank_in_use


def mix(reading: Reading, y: Tensor) -> Tensor:
    """One linear of a mixed feed-forward, from what it reads and its frozen output y (batch, ..., d_out).

    Returns:
        (slot * batch, ..., d_out) from the first linears, (batch, ..., d_out) from the last.

    Raises:
        RoutingError: the last linear is not called with what the first ones returned.
    """
    mount, cache = reading.mount, reading.call.cache
    assert mount.feed_forward is not None
    place = mount.adapter, mount.feed_forward
    if mount.leaves:
        return _leave(reading, y, cache.slots.get(place))
    slots = cache.slots[place] = _slots(reading)
    return _ADD[slots.way](reading, y.repeat(slots.count, *[1] * (y.dim() - 1)), slots)


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


def _slots(reading: Reading) -> Slots:
    """The experts of each token, one per slot, with weights that sum to 1."""
    way = way_of(reading)
    found = chosen(reading, way, skip=False)
    (picks,), (every,) = found.picks.values(), found.weights.values()
    total = every.sum(dim=-1, keepdim=True)
    nobody = total == 0  # asked for the base only, or no expert passed the threshold: the frozen block
    count = picks.experts.shape[1]
    weights = torch.where(nobody, 1 / count, picks.weights / total.masked_fill(nobody, 1.0))
    on = (~nobody).to(weights.dtype).expand(-1, count)
    by_slot = Picks(*(rearrange(part, "row slot -> (slot row) 1") for part in (picks.experts, on)))
    weights = spread(weights, reading.lead).expand(math.prod(reading.lead), -1)
    return Slots(weights, by_slot, way.name, tuple(reading.lead))


def _leave(reading: Reading, y: Tensor, slots: Slots | None) -> Tensor:
    if slots is None or math.prod(reading.lead) != slots.weights.numel():
        raise RoutingError(
            f"{reading.mount.key} ends a mixed feed-forward, but is not called with what the first linears of it returned.",
            hint="call the model as a whole; name only linears of one feed-forward block in ffn_targets.",
        )
    y = _ADD[slots.way](reading, y, slots)
    by_slot = rearrange(
        y.reshape(-1, y.shape[-1]), "(slot tokens) d_out -> slot tokens d_out", slot=slots.count
    )
    mixed = einsum(by_slot, slots.weights.to(y.dtype), "slot tokens d_out, tokens slot -> tokens d_out")
    return mixed.to(y.dtype).reshape(*slots.lead, y.shape[-1])


# -- add each slot's expert to its copy of y; the first linears read one x for all slots -----------------------


def _dense(reading: Reading, y: Tensor, slots: Slots) -> Tensor:
    bank, experts = reading.mount.bank, reading.experts
    operands = bank.operands(experts, reading.x)
    weights = F.one_hot(slots.picks.experts[:, 0], bank.num_experts) * slots.picks.weights
    h = bank.shrunk(reading.x, operands).repeat(1 if reading.mount.leaves else slots.count, 1)
    columns = weights if experts is None else weights[:, list(experts)]
    return expand(y, h, columns, operands.expansion, operands.B)


def _by_sample(reading: Reading, y: Tensor, slots: Slots) -> Tensor:
    bank, x, picks = reading.mount.bank, reading.mount.bank.dropout(reading.x), slots.picks
    once = not reading.mount.leaves
    rows = len(picks.experts) // slots.count if once else len(picks.experts)
    A, B = picked(bank, picks.experts, rank_in_use(reading, reading.mount))
    if A is None:
        h = bank.shared_h(x).repeat(slots.count if once else 1, 1)
    elif once:
        A = A._replace(places=rearrange(A.places, "(slot row) 1 -> row slot", row=rows))
        h = by_sample.shrink(x.reshape(rows, -1, x.shape[-1]), [A])
        h = rearrange(h, "row seq (slot rank) -> (slot row) seq rank", slot=slots.count)
    else:
        h = by_sample.shrink(x.reshape(rows, -1, x.shape[-1]), [A])
    h = h.reshape(len(picks.experts), -1, h.shape[-1])
    return by_sample.expand(y, h, scale_of(bank, picks, B.rank)[:, 0], B)


def _by_token(reading: Reading, y: Tensor, slots: Slots) -> Tensor:
    bank, x, picks = reading.mount.bank, reading.mount.bank.dropout(reading.x), slots.picks
    groups = by_token.Groups.of(picks.experts, bank.num_experts)
    read = groups if reading.mount.leaves else groups.of_one_copy(slots.count)
    A, B, _ = ordered(bank)
    h = bank.shared_h(x)[read.token] if A is None else by_token.shrink(x, [A], read)
    return by_token.expand(y, h, scale_of(bank, picks, B.shape[1])[groups.pair, 0], B, groups)


_ADD = {"dense": _dense, "by_sample": _by_sample, "by_token": _by_token}

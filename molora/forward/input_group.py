"""The linears that read one input compute together: one GEMM gives all of their `A x`, in one pass over x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from molora.calls.call import Call, Projection
from molora.calls.decide import decided
from molora.calls.task_ids import spread
from molora.experts.factor_mix import add_mixed
from molora.experts.kernel import expand, joined, linear_dtype, scores, shrink, weigh
from molora.forward.feed_forward import mix
from molora.forward.group_routing import routing_of, sample_routing
from molora.forward.mount import PLAIN, GroupOperands, Mount, Plan
from molora.forward.samples import note_sample


def add_experts(mount: Mount, call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Add one adapter's mixture at one layer to the base layer's output.

    Args:
        mount: the adapter at this layer.
        call: the current one.
        x: (batch, ..., d_in) the layer's input.
        y: (batch, ..., d_out) the base layer's output; may be overwritten.
    """
    tasks = mount.tasks(call)
    if call.first_pass or (tasks is not None and tasks.all_base):
        return y
    if mount.names is not None and mount.experts(call) == ():  # a task none of whose experts is here
        return y
    if mount.feed_forward is not None:
        return mix(mount, call, x, y)
    if mount.factors:
        experts = mount.experts(call)
        routing = sample_routing(mount, call, x, experts)
        return add_mixed(mount.bank, x, y, routing.weights, experts, routing.splits)
    projections, key = call.cache.projections, mount.key
    shared = projections.get(mount.adapter)
    if shared is None or shared.x is not x or key not in shared.h:
        # Computed already, but of another x: it does not read what the first one of its group reads.
        differs = shared is not None and key in shared.h
        # Outside a root forward nobody says when x or the Parameters changed: there each layer is alone.
        plan = mount.inputs.plan(mount, alone=differs or call.owner is None)
        shared = project(plan, mount, call, x)
        if len(shared.h) > 1:
            projections[mount.adapter] = shared
    elif len(shared.h) == 1:  # nobody else waits for it
        del projections[mount.adapter]
    weights = None if shared.weights is None else shared.weights[key]
    if call.recording and weights is not None and not mount.plain:
        note_sample(mount, call, x, weights)
    return expand(y, shared.h.pop(key), weights, shared.expansions[key], shared.B[key])


def project(plan: Plan, mount: Mount, call: Call, x: Tensor) -> Projection:
    """Compute h and the weights of all members of a plan; `mount` is the one that was called."""
    experts = mount.experts(call)
    operands = _operands(plan, experts, x)
    one = mount.config.gate.alone_is_one
    routed = decided(mount.task_map, call, experts, alone_is_one=one)
    h, products = _shrink(plan, x, operands, routed=routed, shares=_shares(plan, mount, call, x))
    weights = _weights(plan, mount, call, x, experts, products)
    keys = [member.key for member in plan.members]
    by_site = None
    if operands.joint is None:
        by_site = {key: weights[slot] for key, slot in zip(keys, plan.slots, strict=True)}
    else:  # without gradients the whole group is weighted at once
        h = weigh(h, _side_by_side(list(weights.values())), operands.joint)
    columns = (h,) if len(keys) == 1 else h.split(operands.widths, dim=-1)
    return Projection(x, dict(zip(keys, columns, strict=True)), by_site, operands.B, operands.expansions)


def _shares(plan: Plan, mount: Mount, call: Call, x: Tensor) -> Tensor | None:
    """Each sample's share of each task, (sample, task), where some members have a core for each task."""
    tasks = mount.tasks(call)
    if tasks is None or all(member.bank.cores is None for member in plan.members):
        return None
    size = next(m.bank.cores.num_experts for m in plan.members if m.bank.cores is not None)
    shares = tasks.shares(size, x.device)
    return shares if len(shares) == 1 else shares.repeat_interleave(x.shape[0] // len(shares), dim=0)


def _operands(plan: Plan, experts: tuple[int, ...] | None, x: Tensor) -> GroupOperands:
    """The members' factors as views; for the steps of a decoding joined and cast, once.

    A forward over several positions reads the Parameters anew and ends the keeping, so only `.data` edits between
    the steps of one generation could go unnoticed; all other changes show in the stamp.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _new_operands(plan, experts, x)
    if x.shape[-2:-1] != (1,):
        plan.kept = None
        return _new_operands(plan, experts, x)
    dtype = linear_dtype(x)
    stamp = (experts, dtype, x.device, *(mark for m in plan.members for mark in m.bank.stamp()))
    kept = plan.kept  # read once: another thread may replace it
    if kept is None or kept[0] != stamp:
        operands = _new_operands(plan, experts, x)
        operands.A = [joined(operands.A, dtype)]
        operands.B = {key: [_for_one_row(joined(B, dtype))] for key, B in operands.B.items()}
        kept = plan.kept = stamp, operands
    return kept[1]


def _for_one_row(B: Tensor) -> Tensor:
    """B as the product with a single row reads it fastest: in 16 bits laid out as a linear's weight is."""
    return B if B.dtype in (torch.float32, torch.float64) else B.t().contiguous().t()


def _new_operands(plan: Plan, experts: tuple[int, ...] | None, x: Tensor) -> GroupOperands:
    parts = [
        member.bank.operands(None if slot == PLAIN else experts, x)
        for member, slot in zip(plan.members, plan.slots, strict=True)
    ]
    expansions = [part.expansion for part in parts]
    tiles = None
    if any(member.bank.kind.shares_A for member in plan.members):
        tiles = [(sum(len(stack) for stack in part.A), part.copies) for part in parts]
    keys = [member.key for member in plan.members]
    return GroupOperands(
        [stack for part in parts for stack in part.A],
        tiles,
        [expansion.shape[1] for expansion in expansions],
        {key: part.B for key, part in zip(keys, parts, strict=True)},
        dict(zip(keys, expansions, strict=True)),
        None if torch.is_grad_enabled() else _joint_expansion(expansions, plan.slots),
    )


def _joint_expansion(parts: Sequence[Tensor], slots: Sequence[str]) -> Tensor:
    """Expansions side by side; layers with the same gate share rows, others have rows of their own."""
    blocks = []
    for slot in dict.fromkeys(slots):
        experts = len(parts[slots.index(slot)])
        own = [
            p if s == slot else p.new_zeros(experts, p.shape[1]) for p, s in zip(parts, slots, strict=True)
        ]
        blocks.append(torch.cat(own, dim=1))
    return torch.cat(blocks)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    tokens = max(len(w) for w in weights)
    return torch.cat([w.expand(tokens, -1) for w in weights], dim=-1)


def _shrink(
    plan: Plan, x: Tensor, operands: GroupOperands, *, routed: bool, shares: Tensor | None
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """h of all members, and the products of x and the rows of each gate that reads it, by slot."""
    A = operands.A
    scored = {} if routed else plan.readers
    readers = {slot: rows for slot, (gate, rows) in scored.items() if rows is not None and gate.scores_x}
    blocks = [block for rows in readers.values() for block in rows.blocks]
    bank = plan.members[0].bank
    if bank.dropout_p and bank.training:  # one mask for the group; the gate reads x itself
        h = shrink(bank.dropout(x), A)[0]
        products = scores(x, blocks) if blocks else None
    else:
        h, products = shrink(x, A, blocks)
    if operands.tiles is not None:  # one A for all experts: its product stands once for each
        parts = h.split([columns for columns, _ in operands.tiles], dim=-1)
        tiled = zip(plan.members, parts, operands.tiles, strict=True)
        h = torch.cat([m.bank.spread(part, copies, shares) for m, part, (_, copies) in tiled], dim=-1)
    if products is None:
        return h, {}
    sizes = [rows.num_experts for rows in readers.values()]
    split = (products,) if len(sizes) == 1 else products.split(sizes, dim=-1)
    return h, {slot: rows.in_order(part) for (slot, rows), part in zip(readers.items(), split, strict=True)}


def _weights(
    plan: Plan,
    mount: Mount,
    call: Call,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Expert weights by slot, (tokens, expert) or (1, expert); zero for tokens that ask for the base only."""
    tasks, gate = mount.tasks(call), mount.config.gate
    found: dict[str, Tensor] = {}
    by_token = gate.scope == "token" or not gate.learned
    for member, slot in zip(plan.members, plan.slots, strict=True):
        if slot == PLAIN:
            found[slot] = mount.task_map.row((1.0,), x)
        elif slot not in found:
            routing = routing_of(member, plan, call, x, experts, products.get(slot))
            # Comparing sizes would fix those of an exported model: not where rows are tokens anyway.
            found[slot] = routing.weights if by_token else spread(routing.weights, x.shape[:-1])
    if tasks is not None and tasks.some_base:
        asked = tasks.asked(x.shape[:-1], x.device)
        return {slot: weights * asked for slot, weights in found.items()}
    return found

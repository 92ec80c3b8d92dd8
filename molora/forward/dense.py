"""The dense way: one GEMM gives `A x` of all experts of all layers that read x, in one pass over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.calls.call import Part
from molora.calls.decide import decided
from molora.calls.task_ids import spread
from molora.experts.kernel import expand, joined, linear_dtype, scores, shrink, weigh
from molora.experts.output_scale import mixed
from molora.forward.group_routing import routing_of
from molora.forward.mount import PLAIN, GroupOperands, Plan
from molora.forward.reading import Reading
from molora.forward.scaled import Scaled
from molora.gates.rows import GateRows


@dataclass
class DensePart:
    """One layer's h (tokens, rank) of all its experts, and what they are multiplied by; see `kernel.expand`."""

    h: Tensor
    weights: Tensor | None  # (tokens, expert) or (1, expert); None: h is weighted already
    expansion: Tensor
    B: list[Tensor]

    def add(self, y: Tensor) -> Tensor:
        """Add the mixture to the base's output."""
        return expand(y, self.h, self.weights, self.expansion, self.B)


def dense_parts(reading: Reading, weights: Mapping[str, Tensor] | None = None) -> dict[str, Part]:
    """By module name, the parts of all members of a plan; `weights`: by slot, where they are known already."""
    plan, mount, experts = reading.plan, reading.mount, reading.experts
    operands = _operands(reading)
    routed = weights is not None or decided(mount.config.gate, mount.task_map, reading.call, experts)
    h, products = _shrink(reading, operands, routed=routed)
    if weights is None:
        weights = _weights(reading, products)
    joint = operands.joint
    if joint is not None:  # without gradients the whole group is weighted at once
        every = [*weights.values()]
        h = weigh(h, every[0] if len(every) == 1 else _side_by_side(every), joint)
    columns = (h,) if len(plan.members) == 1 else h.split_with_sizes(operands.widths, -1)
    parts: dict[str, Part] = {}
    for (key, B), slot, own in zip(operands.B.items(), plan.slots, columns, strict=True):
        parts[key] = DensePart(own, weights[slot] if joint is None else None, operands.expansions[key], B)
    for member, slot in zip(plan.members, plan.slots, strict=True) if operands.deviations else ():
        if (deviation := operands.deviations.get(member.key)) is not None:
            parts[member.key] = Scaled.of(parts[member.key], member.bank, mixed(weights[slot], deviation))
    return parts


def _operands(reading: Reading) -> GroupOperands:
    """The members' factors as views; for the steps of a decoding joined and cast, once.

    A forward over several positions reads the Parameters anew and ends the keeping, so only `.data` edits between
    the steps of one generation could go unnoticed; `Kept` sees all others.
    """
    plan, experts, x = reading.plan, reading.experts, reading.x
    if reading.traced or torch.is_grad_enabled():
        return _new_operands(plan, experts, x)
    if x.shape[-2:-1] != (1,):
        plan.kept = None
        return _new_operands(plan, experts, x)
    dtype = linear_dtype(x)
    facts, kept = (experts, dtype, x.device), plan.kept  # read once: another thread may replace it
    if kept is not None and kept.holds(facts):
        return kept.value
    operands = _new_operands(plan, experts, x)
    operands.A = [joined(operands.A, dtype)]
    operands.B = {key: [_for_one_row(joined(B, dtype))] for key, B in operands.B.items()}
    return plan.keep(facts, operands)


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
        {k: part.deviation for k, part in zip(keys, parts, strict=True) if part.deviation is not None},
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
    tokens = max(len(w) for w in weights)
    return torch.cat([w.expand(tokens, -1) for w in weights], dim=-1)


def _shrink(
    reading: Reading, operands: GroupOperands, *, routed: bool
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """h of all members, and the products of x and the rows of each gate that reads it, by slot."""
    plan, x, A = reading.plan, reading.x, operands.A
    readers: dict[str, GateRows] = {}
    blocks: list[Tensor] = []
    for slot, (gate, rows) in () if routed else plan.readers.items():
        if rows is not None and gate.scores_x:
            readers[slot] = rows
            blocks += rows.blocks
    bank = plan.members[0].bank
    if bank.dropout_p and bank.training:  # one mask for the group; the gate reads x itself
        h = shrink(bank.dropout(x), A)[0]
        products = scores(x, blocks) if blocks else None
    else:
        h, products = shrink(x, A, blocks)
    if operands.tiles is not None:  # one A for all experts: its product stands once for each
        shares = reading.shares()
        parts = h.split([columns for columns, _ in operands.tiles], dim=-1)
        tiled = zip(plan.members, parts, operands.tiles, strict=True)
        h = torch.cat([m.bank.spread(part, copies, shares) for m, part, (_, copies) in tiled], dim=-1)
    if products is None:
        return h, {}
    if len(readers) == 1:
        ((slot, rows),) = readers.items()
        return h, {slot: rows.in_order(products)}
    split = products.split([rows.num_experts for rows in readers.values()], dim=-1)
    return h, {slot: rows.in_order(part) for (slot, rows), part in zip(readers.items(), split, strict=True)}


def _weights(reading: Reading, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Expert weights by slot, (tokens, expert) or (1, expert); zero for tokens that ask for the base only."""
    mount, x, tasks, gate = reading.mount, reading.x, reading.tasks, reading.mount.config.gate
    found: dict[str, Tensor] = {}
    by_token = gate.scope == "token" or not gate.learned
    for member, slot in zip(reading.plan.members, reading.plan.slots, strict=True):
        if slot == PLAIN:
            found[slot] = mount.task_map.row((1.0,), x)
        elif slot not in found:
            routing = routing_of(member, reading, products.get(slot))
            # Comparing sizes would fix those of an exported model: not where rows are tokens anyway.
            found[slot] = routing.weights if by_token else spread(routing.weights, reading.lead)
    if tasks is not None and tasks.some_base:
        asked = tasks.asked(reading.lead, x.device)
        return {slot: weights * asked for slot, weights in found.items()}
    return found

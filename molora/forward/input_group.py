"""InputGroup: the linears that read one input. One GEMM gives all of their `A x`, in one pass over x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molora.calls.call import TaskIds, base_only, spread
from molora.calls.decide import decided
from molora.experts.bank import ExpertBank
from molora.experts.kernel import joined, linear_dtype, scores, shrink, weigh
from molora.forward.group_routing import experts_of, recorded, task_map_of
from molora.gates.gate import Gate
from molora.gates.rows import GateRows

if TYPE_CHECKING:
    from molora.tuner.layer import MoLoraLayer

_PLAIN = "plain"  # the slot of ordinary LoRAs, whose weight is 1


@dataclass
class Operands:
    """What a plan multiplies by, for the experts in use."""

    A: list[Tensor]  # stacks (rank, d_in), those of the members below each other
    tiles: list[tuple[int, int]] | None  # where some members share A: (columns of their product, copies)
    widths: list[int]  # columns of h that belong to each member
    B: dict[str, list[Tensor]]  # by site: stacks (rank, d_out)
    expansions: dict[str, Tensor]  # by site: (expert, rank)
    joint: Tensor | None  # without gradients: (expert, rank) from the weights of all gates to all columns


@dataclass
class Plan:
    """The parts of the layers that compute together; looked up once, since modules are slow to search."""

    keys: list[str]
    stream: str  # whose tokens they read
    banks: list[ExpertBank]
    slots: list[str]  # per layer, whose weights it uses: the site that owns the gate
    leaders: dict[str, MoLoraLayer]  # by slot
    gates: dict[str, Gate | None]  # by slot
    readers: dict[str, tuple[Gate, GateRows]]  # by slot: gates that read this input, and their rows
    kept: tuple[Any, Operands] | None = None  # the operands of the last decoding step, and their stamp

    @classmethod
    def of(cls, members: Sequence[MoLoraLayer], adapter: str) -> Plan:
        sites = [member.sites[adapter] for member in members]
        slots = [_PLAIN if site.plain else site.group[0].sites[adapter].key for site in sites]
        leaders = {slot: site.group[0] for slot, site in zip(slots, sites, strict=True) if not site.plain}
        return cls(
            keys=[site.key for site in sites],
            stream=sites[0].stream,
            banks=[member.molora_experts[adapter] for member in members],
            slots=slots,
            leaders=leaders,
            gates={slot: leader.gate_of(adapter) for slot, leader in leaders.items()},
            readers={
                slot: (leader.molora_gate[adapter], leader.molora_gate[adapter].rows)
                for slot, leader in leaders.items()
                if leader.sites[adapter].reads_input
                and (leader in members or not leader.sites[adapter].spreads)
            },
        )


@dataclass
class Projection:
    """What a group computed from x. By site; each layer takes its h away."""

    x: Tensor
    h: dict[str, Tensor]  # (tokens, rank)
    weights: dict[str, Tensor] | None  # (tokens, expert) or (1, expert); None: h is weighted already
    operands: Operands


@dataclass
class InputGroup:
    """One adapter's layers that read the same input, in the model's order.

    Whichever is called first computes for all of them. A layer that is then called with another x computes for itself:
    nothing is assumed of the attention code, and nothing in it is changed.
    """

    layers: list[MoLoraLayer] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)  # by first site; "" for the whole group

    def plan(self, layer: MoLoraLayer, adapter: str, *, alone: bool) -> Plan:
        """The plan of the whole group, or of one of its layers."""
        members = [layer] if alone else self.layers
        if torch.compiler.is_compiling():  # a cache that tracing fills compiles the model twice
            return Plan.of(members, adapter)
        name = layer.sites[adapter].key if alone else ""
        if name not in self.plans:
            self.plans[name] = Plan.of(members, adapter)
        return self.plans[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "plans": {}}


def project(layer: MoLoraLayer, adapter: str, x: Tensor, *, alone: bool) -> Projection:
    """Compute h and the weights of a layer, and of the others of its group unless it is `alone`.

    Outside a root forward nobody says when x or the Parameters changed: there each layer is alone.
    """
    context = layer.context
    state, config = context.state, context.adapters[adapter].config
    group = layer.sites[adapter].inputs
    plan = group.plan(layer, adapter, alone=alone)
    experts = experts_of(layer, adapter)
    task_map = task_map_of(layer, adapter)
    operands = _operands(plan, experts, x)
    routed = decided(task_map, state, experts, alone_is_one=config.gate.alone_is_one)
    h, products = _shrink(plan, x, operands, routed=routed, shares=_shares(plan, state.tasks.get(adapter), x))
    weights = _weights(layer, plan, adapter, x, experts, products)
    by_site = None
    if operands.joint is None:
        by_site = {key: weights[slot] for key, slot in zip(plan.keys, plan.slots, strict=True)}
    else:  # without gradients the whole group is weighted at once
        h = weigh(h, _side_by_side(list(weights.values())), operands.joint)
    if len(plan.keys) == 1:
        return Projection(x, {plan.keys[0]: h}, by_site, operands)
    columns = h.split(operands.widths, dim=-1)
    return Projection(x, dict(zip(plan.keys, columns, strict=True)), by_site, operands)


def _shares(plan: Plan, tasks: TaskIds | None, x: Tensor) -> Tensor | None:
    """Each sample's share of each task, (sample, task), where some members have a core for each task."""
    if tasks is None or all(bank.cores is None for bank in plan.banks):
        return None
    size = next(bank.cores.num_experts for bank in plan.banks if bank.cores is not None)
    shares = tasks.shares(size, x.device)
    return shares if len(shares) == 1 else shares.repeat_interleave(x.shape[0] // len(shares), dim=0)


def _operands(plan: Plan, experts: tuple[int, ...] | None, x: Tensor) -> Operands:
    """The members' factors as views; for the steps of a decoding joined and cast, once.

    A forward over several positions reads the Parameters anew and ends the keeping, so only `.data` edits between
    the steps of one generation could go unnoticed; all other changes show in the stamp.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _new_operands(plan, experts, x)
    if x.shape[-2:-1] != (1,):
        plan.kept = None
        return _new_operands(plan, experts, x)
    stamp = (experts, linear_dtype(x), x.device, *(mark for bank in plan.banks for mark in bank.stamp()))
    if plan.kept is None or plan.kept[0] != stamp:
        operands, dtype = _new_operands(plan, experts, x), linear_dtype(x)
        operands.A = [joined(operands.A, dtype)]
        operands.B = {key: [_for_one_row(joined(B, dtype))] for key, B in operands.B.items()}
        plan.kept = stamp, operands
    return plan.kept[1]


def _for_one_row(B: Tensor) -> Tensor:
    """B as the product with a single row reads it fastest: in 16 bits laid out as a linear's weight is."""
    return B if B.dtype in (torch.float32, torch.float64) else B.t().contiguous().t()


def _new_operands(plan: Plan, experts: tuple[int, ...] | None, x: Tensor) -> Operands:
    parts = [
        bank.operands(None if slot == _PLAIN else experts, x)
        for bank, slot in zip(plan.banks, plan.slots, strict=True)
    ]
    expansions = [part.expansion for part in parts]
    tiles = None
    if any(bank.kind.shares_A for bank in plan.banks):
        tiles = [(sum(len(stack) for stack in part.A), part.copies) for part in parts]
    return Operands(
        [stack for part in parts for stack in part.A],
        tiles,
        [expansion.shape[1] for expansion in expansions],
        {key: part.B for key, part in zip(plan.keys, parts, strict=True)},
        dict(zip(plan.keys, expansions, strict=True)),
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
    plan: Plan, x: Tensor, operands: Operands, *, routed: bool, shares: Tensor | None
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """h of all members, and the products of x and the rows of each gate that reads it, by slot."""
    A = operands.A
    readers = {} if routed else {slot: rows for slot, (gate, rows) in plan.readers.items() if gate.scores_x}
    blocks = [block for rows in readers.values() for block in rows.blocks]
    bank = plan.banks[0]
    if bank.dropout_p and bank.training:  # one mask for the group; the gate reads x itself
        h = shrink(bank.dropout(x), A)[0]
        products = scores(x, blocks) if blocks else None
    else:
        h, products = shrink(x, A, blocks)
    if operands.tiles is not None:  # one A for all experts: its product stands once for each
        parts = h.split([columns for columns, _ in operands.tiles], dim=-1)
        spread = zip(plan.banks, parts, operands.tiles, strict=True)
        h = torch.cat([bank.spread(part, copies, shares) for bank, part, (_, copies) in spread], dim=-1)
    if products is None:
        return h, {}
    sizes = [rows.num_experts for rows in readers.values()]
    split = (products,) if len(sizes) == 1 else products.split(sizes, dim=-1)
    return h, {slot: rows.in_order(part) for (slot, rows), part in zip(readers.items(), split, strict=True)}


def _weights(
    layer: MoLoraLayer,
    plan: Plan,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Expert weights by slot, (tokens, expert) or (1, expert); zero for tokens that ask for the base only."""
    state = layer.context.state
    tasks = state.tasks.get(adapter)
    found: dict[str, Tensor] = {}
    gate = layer.context.adapters[adapter].config.gate
    by_token = gate.scope == "token" or not gate.learned
    for key, slot in zip(plan.keys, plan.slots, strict=True):
        if slot == _PLAIN:
            found[slot] = task_map_of(layer, adapter).row((1.0,), x)
        elif slot not in found:
            routing = recorded(layer, plan, key, adapter, x, experts, products.get(slot))
            # Comparing sizes would fix those of an exported model: not where rows are tokens anyway.
            found[slot] = routing.weights if by_token else spread(routing.weights, x.shape[:-1])
    if tasks is not None and tasks.single is None and tasks.has_base:
        asked = base_only(tasks.expand(x.shape[:-1]).to(x.device))
        return {slot: weights * asked for slot, weights in found.items()}
    return found

"""InputGroup: the linears that read one input. One GEMM gives all of their `A x`, in one pass over x."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molora.context import RoutingState, base_only, spread
from molora.errors import RoutingError
from molora.experts.bank import ExpertBank
from molora.experts.kernel import joined, linear_dtype, scores, shrink, weigh
from molora.gates.gate import Gate, Routing
from molora.gates.route import decided, experts_in_use, route
from molora.gates.scores import GateRows
from molora.task_map import TaskMap

if TYPE_CHECKING:
    from molora.tuner.layer import MoLoraLayer

_PLAIN = "plain"  # the slot of ordinary LoRAs, whose weight is 1
_READ_X = ("similarity",)  # losses that look at what the gate read


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
    def gated(self) -> tuple[int, ...] | None:
        """The experts its columns stand for, where some are always on and not among them."""
        return self.task_map.gated if self.routing.gated is not None else None


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

    The first layer computes for all of them. A layer that is then called with another x computes for itself:
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


def project(layer: MoLoraLayer, adapter: str, x: Tensor) -> Projection:
    """Compute h and the weights of a layer, and of the others of its group if it is their first."""
    context = layer.context
    state, config = context.state, context.adapters[adapter].config
    group = layer.sites[adapter].inputs
    # Outside a root forward nobody says when x or the Parameters changed: compute for this layer alone.
    plan = group.plan(layer, adapter, alone=state.owner is None or group.layers[0] is not layer)
    experts = experts_of(layer, adapter)
    task_map = task_map_of(layer, adapter)
    operands = _operands(plan, experts, x)
    routed = decided(task_map, state, experts, alone_is_one=config.gate.alone_is_one)
    h, products = _shrink(plan, x, operands, routed=routed)
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


def task_map_of(layer: MoLoraLayer, adapter: str) -> TaskMap:
    """The tasks and experts of one layer."""
    return layer.context.adapters[adapter].map_at(layer.sites[adapter].names)


def experts_of(layer: MoLoraLayer, adapter: str) -> tuple[int, ...] | None:
    """The experts of a layer that this call is limited to; None: any of them."""
    state, gate = layer.context.state, layer.context.adapters[adapter].config.gate
    tasks = state.tasks.get(adapter)
    return experts_in_use(task_map_of(layer, adapter), tasks, state, scope=gate.scope, learned=gate.learned)


def routing_of(layer: MoLoraLayer, adapter: str, x: Tensor, experts: tuple[int, ...] | None) -> Routing:
    """The routing of one layer by itself, recorded where somebody looks."""
    plan = layer.sites[adapter].inputs.plan(layer, adapter, alone=True)
    return _recorded(layer, plan, plan.keys[0], adapter, x, experts, None)


def sample_routing(layer: MoLoraLayer, adapter: str, x: Tensor, experts: tuple[int, ...] | None) -> Routing:
    """The routing of a mixture of factors: rows are samples (or one for all), those for the base only zero."""
    routing = routing_of(layer, adapter, x, experts)
    tasks = layer.context.state.tasks.get(adapter)
    if tasks is not None and tasks.single is None and tasks.has_base:
        if tasks.ids.dim() != 1:
            raise RoutingError("experts mixed by their factors need one task id per sample, not per token.")
        asked = base_only(tasks.ids.to(x.device)).repeat_interleave(routing.splits, dim=0)
        if len(routing.weights) == routing.splits:  # one mixture for all: now it is not
            routing = replace(routing, weights=routing.weights.repeat(len(tasks.ids), 1))
        routing = replace(routing, weights=routing.weights * asked)
    return routing


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
    own = [None if slot == _PLAIN else experts for slot in plan.slots]
    parts = [bank.stacks("A", chosen) for bank, chosen in zip(plan.banks, own, strict=True)]
    A = [stack for stacks in parts for stack in stacks]
    tiles = None
    if any(bank.share_A for bank in plan.banks):
        columns = [sum(len(stack) for stack in stacks) for stacks in parts]
        copies = [bank.copies(chosen) for bank, chosen in zip(plan.banks, own, strict=True)]
        tiles = list(zip(columns, copies, strict=True))
    B = [bank.stacks("B", chosen) for bank, chosen in zip(plan.banks, own, strict=True)]
    expansions = [bank.expansion(chosen, x) for bank, chosen in zip(plan.banks, own, strict=True)]
    return Operands(
        A,
        tiles,
        [part.shape[1] for part in expansions],
        dict(zip(plan.keys, B, strict=True)),
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
    plan: Plan, x: Tensor, operands: Operands, *, routed: bool
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
        h = torch.cat([p.repeat(1, n) for p, (_, n) in zip(parts, operands.tiles, strict=True)], dim=-1)
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
            routing = _recorded(layer, plan, key, adapter, x, experts, products.get(slot))
            # Comparing sizes would fix those of an exported model: not where rows are tokens anyway.
            found[slot] = routing.weights if by_token else spread(routing.weights, x.shape[:-1])
    if tasks is not None and tasks.single is None and tasks.has_base:
        asked = base_only(tasks.expand(x.shape[:-1]).to(x.device))
        return {slot: weights * asked for slot, weights in found.items()}
    return found


def _recorded(
    layer: MoLoraLayer,
    plan: Plan,
    key: str,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Tensor | None,
) -> Routing:
    """The routing of the site `key`, noted where it owns the gate and somebody looks."""
    context, slot = layer.context, plan.slots[plan.keys.index(key)]
    leader, state = plan.leaders[slot], context.state
    routing = _routing(leader, plan, adapter, x, experts, products)
    if state.recording and slot == key:
        lead, stream, tasks = x.shape[:-1], plan.stream, state.tasks.get(adapter)
        wanted = any(name in context.adapters[adapter].aux_losses for name in _READ_X)
        leader.records[adapter] = GateRecord(
            routing,
            tuple(lead),
            state.mask(stream, lead),
            state.response(stream, lead),
            None if tasks is None else tasks.expand(lead),
            task_map_of(leader, adapter),
            getattr(plan.gates[slot], "top_k", 1),
            x.detach() if wanted else None,
        )
    return routing


def _routing(
    leader: MoLoraLayer,
    plan: Plan,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Tensor | None,
) -> Routing:
    """The leader's routing of x, or what it was where this plan's layers only follow.

    That of a gate that reads nothing of the layer is computed once per forward and shape.
    """
    site, context = leader.sites[adapter], leader.context
    state, slot = context.state, site.key
    if site.pools and state.kept is not None and state.experts is None:
        return _of_prompt(state, adapter, slot)
    if site.reads_input and not site.spreads:
        return _fresh(leader, plan, adapter, x, experts, products)
    # One gate may serve encoder and decoder. `numel` would fix an exported size.
    name, tokens = f"{adapter} {slot} {plan.stream}", math.prod(x.shape[:-1])
    if site.spreads and slot not in plan.readers:
        one = context.adapters[adapter].config.gate.alone_is_one
        if not decided(task_map_of(leader, adapter), state, experts, alone_is_one=one):
            return _followed(state.led, name, slot, tokens)
    once = not site.reads_input and state.owner is not None
    if once and name in state.routings and state.routings[name][1] == tokens:
        return state.routings[name][0]
    routing = _fresh(leader, plan, adapter, x, experts, products)
    if once:
        state.routings[name] = routing, tokens
    if site.spreads:
        state.led[name] = routing, tokens
    return routing


def _fresh(
    leader: MoLoraLayer,
    plan: Plan,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Tensor | None,
) -> Routing:
    site, state = leader.sites[adapter], leader.context.state
    routing = route(
        x, plan.gates[site.key], task_map_of(leader, adapter), state.tasks.get(adapter), state, experts,
        products=products, stream=plan.stream, by_sample=site.factors,
    )  # fmt: skip
    if site.pools and state.keep is not None:
        state.keep[f"{adapter} {site.key}"] = replace(routing, weights=routing.weights.detach())
    return routing


def _of_prompt(state: RoutingState, adapter: str, slot: str) -> Routing:
    """What a gate of sequence scope decided on the prompt that this call continues."""
    assert state.kept is not None
    routing = state.kept.get(f"{adapter} {slot}")
    if routing is None:
        raise RoutingError(
            f"the gate at {slot} decides on the prompt, but this cache was not filled by a call of this adapter.",
            hint="start the generation with the adapter on, and keep one cache from the prompt on.",
        )
    return routing


def _followed(led: Mapping[str, tuple[Routing, int]], name: str, key: str, tokens: int) -> Routing:
    """What the gate at `key` decided earlier in this forward, for layers that do not read its input."""
    routing, seen = led.get(name, (None, None))
    if routing is None or seen != tokens:
        what = "has not run yet" if routing is None else f"read {seen} tokens, not {tokens}"
        raise RoutingError(
            f"layers share the gate at {key}, which {what} in this forward.",
            hint="use gate.share='group', or call the model as a whole.",
        )
    return routing

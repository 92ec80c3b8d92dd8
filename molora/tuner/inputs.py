"""InputGroup: the linears that read one input. One GEMM gives all of their `A x`, in one pass over x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molora.context import base_only
from molora.experts.kernel import joined, linear_dtype, scores, shrink
from molora.gates.gate import Routing
from molora.gates.route import experts_in_use, route

if TYPE_CHECKING:
    from molora.tuner.layer import MoLoraLayer

_PLAIN = "plain"


@dataclass
class GateRecord:
    """What one gate decided in one forward; kept only while losses or statistics need it."""

    routing: Routing
    tokens: int
    mask: Tensor | None  # (tokens,) true where a token counts
    task_ids: Tensor | None  # (tokens,)


@dataclass
class Operands:
    """What a group multiplies by, for the experts in use."""

    stamp: Any  # what it was made from
    A: list[Tensor]  # stacks (rank, d_in), those of the layers below each other
    widths: list[int]  # columns of h that belong to each layer
    B: dict[str, list[Tensor]]  # by site: stacks (rank, d_out)
    expansion: (
        Tensor | None
    )  # (expert, rank) from the weights of all gates to all columns, if without gradients


@dataclass
class Projection:
    """What a group computed from x. By site; each layer takes its h away."""

    x: Tensor
    h: dict[str, Tensor]  # (tokens, rank)
    weights: dict[str, Tensor | None]  # (tokens, expert) or (1, expert); None: h is weighted already
    expansions: dict[str, Tensor | None]
    B: dict[str, list[Tensor]]


@dataclass
class InputGroup:
    """Layers that read the same input, in the model's order, and the operands that decoding keeps.

    The first layer computes for all of them. A layer that is then called with another x computes for itself:
    nothing is assumed of the attention code, and nothing in it is changed.
    """

    layers: list[MoLoraLayer] = field(default_factory=list)
    operands: dict[str, Operands] = field(default_factory=dict)  # by adapter

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "operands": {}}


def project(layer: MoLoraLayer, adapter: str, x: Tensor) -> Projection:
    """Compute h and the weights of a layer, and of the others of its group if it is their first."""
    state, routing = layer.context.state, layer.context.adapters[adapter]
    group = layer.sites[adapter].inputs
    # Outside a root forward nobody says when x or the Parameters changed: compute for this layer alone.
    members = group.layers if group.layers[0] is layer and state.owner is not None else [layer]
    experts = experts_in_use(
        routing.task_map, state.tasks.get(adapter), state, learned=routing.config.gate.learned
    )
    operands = _operands(group, members, adapter, experts, x)
    h, logits = _shrink(members, adapter, x, operands.A, forced=state.experts is not None)
    slots = {member.sites[adapter].key: _slot(member, adapter) for member in members}
    weights = _weights(members, adapter, x, experts, logits)
    expansions: dict[str, Tensor | None] = dict.fromkeys(slots)
    if operands.expansion is not None:  # without gradients the whole group is weighted at once
        h = h * (_side_by_side(list(weights.values())) @ operands.expansion).to(h.dtype)
    else:
        for member in members:
            expansions[member.sites[adapter].key] = member.molora_experts[adapter].expansion(
                _own(member, adapter, experts), x
            )
    columns = [h] if len(members) == 1 else h.split(operands.widths, dim=-1)
    return Projection(
        x,
        dict(zip(slots, columns, strict=True)),
        {key: None if operands.expansion is not None else weights[slot] for key, slot in slots.items()},
        expansions,
        operands.B,
    )


def _slot(member: MoLoraLayer, adapter: str) -> str:
    """Whose weights a layer uses: the name of the site that owns its gate."""
    site = member.sites[adapter]
    return _PLAIN if site.plain else site.group[0].sites[adapter].key


def _own(member: MoLoraLayer, adapter: str, experts: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if member.sites[adapter].plain else experts


def _operands(
    group: InputGroup,
    members: Sequence[MoLoraLayer],
    adapter: str,
    experts: tuple[int, ...] | None,
    x: Tensor,
) -> Operands:
    """The members' factors as views; without gradients joined and cast, once for all steps of a decoding.

    A forward over several positions reads the Parameters anew, so only `.data` edits between the steps of one
    generation could go unnoticed; all other changes show in the stamp.
    """
    banks = [member.molora_experts[adapter] for member in members]
    keys = [member.sites[adapter].key for member in members]
    own = [_own(member, adapter, experts) for member in members]
    keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    dtype, stamp = linear_dtype(x), None
    if keep:
        stamp = (experts, dtype, x.device, keys[0], len(keys), [bank.stamp() for bank in banks])
        kept = group.operands.get(adapter)
        if kept is not None and kept.stamp == stamp and x.shape[-2:-1] == (1,):
            return kept
    A = [stack for bank, chosen in zip(banks, own, strict=True) for stack in bank.stacks("A", chosen)]
    B = {key: bank.stacks("B", chosen) for key, bank, chosen in zip(keys, banks, own, strict=True)}
    widths = [bank.width(chosen) for bank, chosen in zip(banks, own, strict=True)]
    if torch.is_grad_enabled():
        return Operands(stamp, A, widths, B, None)
    parts = [bank.expansion(chosen, x) for bank, chosen in zip(banks, own, strict=True)]
    expansion = _block_expansion(parts, [_slot(member, adapter) for member in members])
    joined_B = {key: [joined(stacks, dtype)] for key, stacks in B.items()}
    operands = Operands(stamp, [joined(A, dtype)], widths, joined_B, expansion)
    if keep:
        group.operands[adapter] = operands
    return operands


def _block_expansion(parts: Sequence[Tensor], slots: Sequence[str]) -> Tensor:
    """Expansions side by side; layers with the same gate share rows, others have rows of their own."""
    if len(set(slots)) == 1:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    rows = [
        torch.cat(
            [part if slots[i] == slot else torch.zeros_like(part) for i, part in enumerate(parts)], dim=1
        )
        for slot in dict.fromkeys(slots)
    ]
    return torch.cat(rows)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    tokens = max(len(w) for w in weights)
    return torch.cat([w.expand(tokens, -1) for w in weights], dim=-1)


def _shrink(
    members: Sequence[MoLoraLayer], adapter: str, x: Tensor, A: Sequence[Tensor], *, forced: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """h of all members, and the logits of each gate that reads x, by its site."""
    leaders = {
        _slot(member, adapter): member.sites[adapter].group[0]
        for member in members
        if not forced and not member.sites[adapter].plain and member.sites[adapter].reads_input
    }
    gates = {slot: leader.molora_gate[adapter] for slot, leader in leaders.items()}
    rows = [block for gate in gates.values() for block in gate.rows.blocks]
    bank = members[0].molora_experts[adapter]
    if bank.training and bank.dropout_p:  # one mask for the group; the gate reads x itself
        h = shrink(bank.dropout(x), A)[0]
        logits = scores(x, rows) if rows else None
    else:
        h, logits = shrink(x, A, rows)
    if logits is None:
        return h, {}
    sizes = [gate.rows.num_experts for gate in gates.values()]
    parts = [logits] if len(sizes) == 1 else logits.split(sizes, dim=-1)
    return h, {
        slot: gate.rows.in_order(part) for (slot, gate), part in zip(gates.items(), parts, strict=True)
    }


def _weights(
    members: Sequence[MoLoraLayer],
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    logits: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Expert weights of the members' gates, by site; rows of tokens that ask for the base only are zero."""
    context = members[0].context
    state, task_map = context.state, context.adapters[adapter].task_map
    tasks = state.tasks.get(adapter)
    found: dict[str, Tensor] = {}
    for member in members:
        site, slot = member.sites[adapter], _slot(member, adapter)
        if slot in found:
            continue
        if site.plain:
            weights = task_map.row((1.0,), x)
        else:
            routing = _routing(site.group[0], adapter, x, experts, logits.get(slot))
            weights = routing.weights
            if state.recording and site.group[0] is member:
                lead = x.shape[:-1]
                ids = None if tasks is None else tasks.expand(lead)
                member.records[adapter] = GateRecord(
                    routing, lead.numel(), state.mask(site.stream, lead), ids
                )
        if tasks is not None and tasks.single is None and tasks.has_base:
            weights = weights * base_only(tasks.expand(x.shape[:-1]).to(x.device))
        found[slot] = weights
    return found


def _routing(
    leader: MoLoraLayer,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    logits: Tensor | None,
) -> Routing:
    """The leader's routing of x; that of a gate that reads nothing is computed once per forward and shape."""
    context, site = leader.context, leader.sites[adapter]
    state, task_map = context.state, context.adapters[adapter].task_map
    key = f"{adapter} {site.key} {tuple(x.shape[:-1])}"
    if not site.reads_input and key in state.routings:
        return state.routings[key]
    routing = route(x, leader.gate_of(adapter), task_map, state.tasks.get(adapter), state, experts, logits)
    if not site.reads_input and state.owner is not None:
        state.routings[key] = routing
    return routing

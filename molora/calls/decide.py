"""Which experts one call may use, and with what weights: forced experts, task ids, or the learned gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from molora.calls.call import Call
from molora.calls.task_ids import TaskIds, spread
from molora.calls.task_map import TaskMap
from molora.config.gate import GateSettings
from molora.errors import RoutingError
from molora.experts.kernel import flattened
from molora.gates.gate import Gate, Routing
from molora.gates.pooling import pool


def experts_in_use(
    task_map: TaskMap, tasks: TaskIds | None, call: Call, settings: GateSettings
) -> tuple[int, ...] | None:
    """The experts a whole batch is limited to, so that only they are computed; None: any of them.

    Raises:
        RoutingError: a task gate, or `by="task"`, without task ids.
    """
    if call.experts is not None:
        return tuple(i for i, name in enumerate(task_map.experts) if name in call.experts)
    own_only, found = call.by_task or settings.scope == "task", None
    if tasks is None:
        if own_only:
            _refuse_without_ids(task_map, settings.scope)
    elif tasks.single is not None and (own_only or task_map.isolated or not settings.learned):
        # Named even where it is all experts: the same slice is then computed after the bank has grown.
        found = task_map.visible(tasks.single, own_only=own_only)
    if not call.without:
        return found
    columns = range(len(task_map.experts)) if found is None else found
    return tuple(i for i in columns if task_map.experts[i] not in call.without)


def decided(settings: GateSettings, task_map: TaskMap, call: Call, experts: tuple[int, ...] | None) -> bool:
    """Whether a gate has nothing to decide: experts are forced, or the batch is limited to one of them.

    With gradients, or when somebody looks, the weight of one expert alone is computed all the same.
    """
    if call.experts is not None:
        return True
    if experts is None or len(experts) != 1 or task_map.always or not settings.alone_is_one:
        return False
    return not torch.is_grad_enabled() and not call.recording


def route(
    x: Tensor,
    gate: Gate | None,
    task_map: TaskMap,
    tasks: TaskIds | None,
    call: Call,
    experts: tuple[int, ...] | None,
    *,
    products: Tensor | None = None,
    stream: str = "decoder",
    by_sample: bool = False,
    beside: Tensor | None = None,
) -> Routing:
    """Route an input x (..., d_in) among the `experts_in_use`. Rows are tokens, samples, or one for all.

    Args:
        x: the layer's input.
        gate: the learned gate; None where the task ids decide.
        task_map: the layer's tasks and experts.
        tasks: the batch's task ids, if given.
        call: the current forward's.
        experts: what `experts_in_use` said.
        products: (tokens, expert) of x and the gate's rows, where they are known already.
        stream: whose tokens x holds.
        by_sample: give the weights of task ids one row per sample, not per token.
        beside: (batch, expert) logits of the gate that is blended in.
    """
    if call.experts is not None:
        assert experts is not None
        weights = tuple(float(call.experts[task_map.experts[i]]) for i in experts)
        return Routing(task_map.row(weights, x), experts)
    if experts == ():  # none of the task's experts is here, or all are left out
        return Routing(task_map.row((), x), experts)
    if gate is None:
        assert tasks is not None
        return _by_task_id(x, task_map, tasks, experts, by_sample=by_sample)
    if decided(gate.settings, task_map, call, experts):
        return Routing(task_map.row((1.0,), x), experts)
    read = gate_input(x, gate, tasks, call, stream)
    allowed = None
    own_only = call.by_task or gate.settings.scope == "task"
    several = experts is None or bool(call.without)  # a batch of one task is limited to its experts already
    if tasks is not None and several and (own_only or task_map.isolated):
        rows = None if gate.settings.scope == "constant" else len(read)
        allowed = _allowed(task_map, tasks, x.shape[:-1], x.device, rows, own_only=own_only)
        allowed = allowed if experts is None else allowed[:, list(experts)]
    beside = None if beside is None else spread(beside, x.shape[:-1])
    weigh = partial(gate, products=products, balance=call.balances.get(id(gate)), beside=beside)
    if task_map.always:
        return _with_always(weigh, task_map, read, experts, allowed)
    return weigh(read, experts=experts) if allowed is None else _gated(weigh, read, experts, allowed)


def gate_input(x: Tensor, gate: Gate, tasks: TaskIds | None, call: Call, stream: str = "decoder") -> Tensor:
    """What a gate reads, by its scope: (tokens or samples, d)."""
    settings, lead = gate.settings, x.shape[:-1]
    if settings.scope == "sequence":
        return pool(x, call.pooled(stream, lead), settings.pool)
    if settings.scope == "task":
        assert gate.tasks is not None and tasks is not None  # experts_in_use refused their absence
        return tasks.shares(gate.tasks.num_experts, x.device)
    if settings.scope in ("external", "two_pass"):
        read = call.read(stream, settings.scope, lead).to(x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return read.to(dtype)
    return flattened(x)


def _allowed(
    task_map: TaskMap,
    tasks: TaskIds,
    lead: torch.Size,
    device: torch.device,
    read: int | None,
    *,
    own_only: bool,
) -> Tensor:
    """Which experts each row of what the gate reads may use, (rows, expert) bool.

    `read`: how many rows that are; None for a gate that reads nothing, where each task id has a row.
    """
    table = task_map.visible_table(device, own_only=own_only)
    if tasks.several is not None:
        several = tasks.several.to(device)
        rows = (several[:, : len(table)] @ table.float() > 0) | ~several.any(dim=1, keepdim=True)
    else:
        by_token = read == prod(lead) and read != len(tasks.ids)
        ids = (tasks.expand(lead) if by_token else tasks.ids.reshape(-1)).to(device)
        rows = table[ids.clamp(min=0)] | (ids < 0).unsqueeze(-1)
    if read is None or len(rows) in (1, read):
        return rows
    if read % len(rows):
        raise RoutingError(
            f"got task ids for {len(rows)} samples or tokens, but this gate routes {read} samples."
        )
    return rows.repeat_interleave(read // len(rows), dim=0)


def _gated(
    gate: Callable[..., Routing], read: Tensor, experts: tuple[int, ...] | None, allowed: Tensor | None
) -> Routing:
    """The gate's answer; weight 0 for rows whose task has no expert in this layer."""
    if allowed is None:
        return gate(read, experts=experts)
    nobody = ~allowed.any(dim=-1, keepdim=True)
    routing = gate(read, experts=experts, allowed=allowed | nobody)
    nobody = nobody.repeat_interleave(routing.splits, dim=0)
    routing.weights = routing.weights.masked_fill(nobody, 0.0)
    return routing


def _with_always(
    gate: Callable[..., Routing],
    task_map: TaskMap,
    read: Tensor,
    experts: tuple[int, ...] | None,
    allowed: Tensor | None,
) -> Routing:
    """The gate's weights over the experts it decides over, and those of the experts that are always on."""
    columns = tuple(range(len(task_map.experts))) if experts is None else experts
    gated = tuple(i for i in columns if i in (task_map.gated or ()))
    if not gated:  # nothing to decide: the task has no other expert here
        weights = (task_map.always[task_map.experts[i]] for i in columns)
        return Routing(task_map.row(tuple(1.0 if w == "rest" else float(w) for w in weights), read), experts)
    if allowed is not None:
        allowed = allowed[:, [columns.index(i) for i in gated]]
    routing = _gated(gate, read, gated, allowed)
    decided_weights = routing.weights
    parts = []
    for i in columns:
        if i in gated:
            parts.append(decided_weights[:, gated.index(i)])
            continue
        weight = task_map.always[task_map.experts[i]]
        if weight == "rest":
            parts.append(1 - decided_weights.max(dim=-1).values)
        else:
            parts.append(decided_weights.new_full((len(decided_weights),), float(weight)))
    routing.weights, routing.gated, routing.experts = torch.stack(parts, dim=-1), decided_weights, experts
    return routing


def _by_task_id(
    x: Tensor, task_map: TaskMap, tasks: TaskIds, experts: tuple[int, ...] | None, *, by_sample: bool
) -> Routing:
    if tasks.single is not None:
        own = task_map.experts_of(tasks.single)
        return Routing(
            task_map.row(tuple(w for i, w in own.items() if experts is None or i in experts), x), experts
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if tasks.several is not None:
        weights = task_map.shares(tasks.several.to(x.device)).to(dtype)
        weights = weights if experts is None else weights[:, list(experts)]
        return Routing(weights if by_sample else spread(weights, x.shape[:-1]), experts)
    ids = (tasks.ids if by_sample else tasks.expand(x.shape[:-1])).to(x.device)
    if ids.dim() != 1:
        raise RoutingError("experts mixed by their factors need one task id per sample, not per token.")
    weights = task_map.table(x.device)[ids.clamp(min=0)].to(dtype)
    return Routing(weights if experts is None else weights[:, list(experts)], experts)


def _refuse_without_ids(task_map: TaskMap, scope: str) -> None:
    why = "this adapter's gate decides by task id" if scope == "task" else "by='task' was asked for"
    known = ", ".join(task_map.ids) or "none declared"
    raise RoutingError(
        f"{why}, but no task ids were given. Tasks: {known}.",
        hint="pass routing_task_ids=[...] to the model, or use `with molora.routing(model, task_ids=[...])`, on the command "
        "line --task NAME; outside of training, an adapter with a task router names them itself (molora.fit_router). In a "
        "transformers Trainer the column routing_task_ids needs remove_unused_columns=False, and whole numbers: collators "
        "drop text.",
    )

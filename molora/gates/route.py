"""Which experts one call may use, and with what weights: forced experts, task ids, or the learned gate."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.context import RoutingState, TaskIds
from molora.errors import RoutingError
from molora.gates.gate import Gate, Routing
from molora.task_map import TaskMap


def route(
    x: Tensor, gate: Gate | None, task_map: TaskMap, tasks: TaskIds | None, state: RoutingState
) -> Routing:
    """Route an input x (..., d_in).

    A batch under one task, or under forced experts, names the experts in use, so that only they are
    computed; a mixed batch goes through the weight matrix (tokens, expert).

    Raises:
        RoutingError: a task gate, or `by="task"`, without task ids.
    """
    if state.experts is not None:
        chosen = tuple(i for i, name in enumerate(task_map.experts) if name in state.experts)
        weights = tuple(float(state.experts[task_map.experts[i]]) for i in chosen)
        return Routing(task_map.row(weights, x), chosen)
    if tasks is None and (gate is None or state.by_task):
        why = "this adapter's gate decides by task id" if gate is None else "by='task' was asked for"
        known = ", ".join(task_map.ids) or "none declared"
        raise RoutingError(
            f"{why}, but no task ids were given. Tasks: {known}.",
            hint="pass routing_task_ids=[...] to the model, or use `with molora.routing(model, task_ids=[...])`.",
        )
    if gate is None:
        assert tasks is not None
        return _by_task_id(x, task_map, tasks)
    experts, allowed = _restriction(x, task_map, tasks, state)
    return gate(x.reshape(-1, x.shape[-1]), experts=experts, allowed=allowed)


def _by_task_id(x: Tensor, task_map: TaskMap, tasks: TaskIds) -> Routing:
    if tasks.single is not None:
        experts = task_map.experts_of(tasks.single)
        return Routing(task_map.row(tuple(experts.values()), x), tuple(experts))
    ids = tasks.expand(x.shape[:-1]).to(x.device)
    weights = task_map.table(x.device)[ids.clamp(min=0)]
    return Routing(weights.to(torch.promote_types(x.dtype, torch.float32)))


def _restriction(
    x: Tensor, task_map: TaskMap, tasks: TaskIds | None, state: RoutingState
) -> tuple[tuple[int, ...] | None, Tensor | None]:
    """What a learned gate may use: expert indices for the whole batch, or a mask (tokens, expert)."""
    if tasks is None or not (state.by_task or task_map.isolated):
        return None, None
    if tasks.single is not None:
        # Named even where it is all experts: the same slice is then computed after the bank has grown.
        return task_map.visible(tasks.single, own_only=state.by_task), None
    ids = tasks.expand(x.shape[:-1]).to(x.device)
    table = task_map.visible_table(x.device, own_only=state.by_task)
    return None, table[ids.clamp(min=0)] | (ids < 0).unsqueeze(-1)

"""Which experts one call may use, and with what weights: forced experts, task ids, or the learned gate."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.context import RoutingState, TaskIds
from molora.errors import RoutingError
from molora.gates.gate import Gate, Routing
from molora.task_map import TaskMap


def experts_in_use(
    task_map: TaskMap, tasks: TaskIds | None, state: RoutingState, *, learned: bool
) -> tuple[int, ...] | None:
    """The experts a whole batch is limited to, so that only they are computed; None: any of them.

    Raises:
        RoutingError: a task gate, or `by="task"`, without task ids.
    """
    if state.experts is not None:
        return tuple(i for i, name in enumerate(task_map.experts) if name in state.experts)
    if tasks is None:
        if not learned or state.by_task:
            _refuse_without_ids(task_map, learned)
        return None
    if tasks.single is None or (learned and not (state.by_task or task_map.isolated)):
        return None
    # Named even where it is all experts: the same slice is then computed after the bank has grown.
    return task_map.visible(tasks.single, own_only=state.by_task or not learned)


def decided(state: RoutingState, experts: tuple[int, ...] | None, *, alone_is_one: bool) -> bool:
    """Whether a gate has nothing to decide: experts are forced, or the batch is limited to one of them.

    With gradients, or when somebody looks, the weight of one expert alone is computed all the same.
    """
    if state.experts is not None:
        return True
    alone = alone_is_one and experts is not None and len(experts) == 1
    return alone and not torch.is_grad_enabled() and not state.recording


def route(
    x: Tensor,
    gate: Gate | None,
    task_map: TaskMap,
    tasks: TaskIds | None,
    state: RoutingState,
    experts: tuple[int, ...] | None,
    products: Tensor | None = None,
) -> Routing:
    """Route an input x (..., d_in) among the `experts_in_use`.

    Args:
        x: the input the gate reads, if it reads any.
        gate: the learned gate; None where the task ids decide.
        task_map: the adapter's tasks and experts.
        tasks: the batch's task ids, if given.
        state: the current forward's.
        experts: what `experts_in_use` said.
        products: (tokens, expert) of x and the gate's rows, where they are known already.
    """
    if state.experts is not None:
        assert experts is not None
        weights = tuple(float(state.experts[task_map.experts[i]]) for i in experts)
        return Routing(task_map.row(weights, x), experts)
    if gate is None:
        assert tasks is not None
        return _by_task_id(x, task_map, tasks, experts)
    if experts is not None and decided(state, experts, alone_is_one=gate.settings.alone_is_one):
        return Routing(task_map.row((1.0,), x), experts)
    allowed = None
    if tasks is not None and experts is None and (state.by_task or task_map.isolated):
        ids = tasks.expand(x.shape[:-1]).to(x.device)
        table = task_map.visible_table(x.device, own_only=state.by_task)
        allowed = table[ids.clamp(min=0)] | (ids < 0).unsqueeze(-1)
    return gate(x.reshape(-1, x.shape[-1]), products=products, experts=experts, allowed=allowed)


def _by_task_id(x: Tensor, task_map: TaskMap, tasks: TaskIds, experts: tuple[int, ...] | None) -> Routing:
    if tasks.single is not None:
        return Routing(task_map.row(tuple(task_map.experts_of(tasks.single).values()), x), experts)
    ids = tasks.expand(x.shape[:-1]).to(x.device)
    weights = task_map.table(x.device)[ids.clamp(min=0)]
    return Routing(weights.to(torch.promote_types(x.dtype, torch.float32)))


def _refuse_without_ids(task_map: TaskMap, learned: bool) -> None:
    why = "by='task' was asked for" if learned else "this adapter's gate decides by task id"
    known = ", ".join(task_map.ids) or "none declared"
    raise RoutingError(
        f"{why}, but no task ids were given. Tasks: {known}.",
        hint="pass routing_task_ids=[...] to the model, or use `with molora.routing(model, task_ids=[...])`.",
    )

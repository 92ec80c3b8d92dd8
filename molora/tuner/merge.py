"""Weights that do not depend on x: what merging and exporting need, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from molora.calls.call import Call
from molora.calls.decide import route
from molora.calls.task_ids import TaskIds
from molora.calls.task_map import TaskMap
from molora.config.mixture import SavedMixture
from molora.config.suggest import options
from molora.errors import ConfigError
from molora.forward.mount import Mount
from molora.gates.gate import Gate
from molora.tuner.placement import experts_at
from molora.tuner.prompts import refuse_prompts

ExpertWeights = Mapping[str, float] | Sequence[float]
"""`{expert: weight}`, the others 0; or a weight for each expert."""


class UndecidedError(ConfigError):
    """What is merged has to be said: experts with weights, or a task."""


def named_weights(config: SavedMixture, given: ExpertWeights, names: Sequence[str]) -> list[float]:
    """The weights given to the experts `names`."""
    known = config.expert_names or []
    if not isinstance(given, Mapping):
        if len(given) != len(known):
            raise ConfigError(f"{len(given)} expert weights for {len(known)} experts ({', '.join(known)}).")
        given = dict(zip(known, given, strict=True))
    for name, weight in given.items():
        if name not in known:
            raise ConfigError(f"unknown expert {name!r}.{options(name, known, 'Experts')}")
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of expert {name!r} is {weight}; give a number.")
    return [float(given.get(name, 0.0)) for name in names]


def static_weights(
    mount: Mount, task: str | None = None, expert_weights: ExpertWeights | None = None
) -> Tensor:
    """One layer's expert weights (splits, expert) where they do not depend on x, in float32 or better.

    Raises:
        ConfigError: they do depend on x; the message says which calls are exact.
    """
    refuse_prompts(mount.config)
    if mount.plain:
        return torch.ones(1, 1)
    names = experts_at(mount.config, mount.key)
    if expert_weights is not None:
        weights = torch.tensor([named_weights(mount.config, expert_weights, names)])
    else:
        weights = _decided(mount, task, names)
    if mount.feed_forward is not None and (weights != 0).sum() != 1:
        text = "experts of whole feed-forwards are mixed after a non-linearity, so a mixture of them is no weight matrix."
        raise UndecidedError(text, hint="merge or export one expert at a time: expert_weights={name: 1.0}.")
    return weights


def static_shares(mount: Mount, task: str | None) -> Tensor | None:
    """A task's share of each task (1, task), where the layer has a core for each of them.

    Raises:
        ConfigError: it has, and no task is named.
    """
    cores, task_map = mount.bank.cores, mount.routing.task_map
    if cores is None:
        return None
    task = _only_task(task_map) if task is None else task
    if task is None:
        tasks = ", ".join(task_map.ids)
        raise UndecidedError(f"each task has a core of its own; name one: task=... Tasks: {tasks}.")
    ids = torch.arange(cores.num_experts)
    return (ids == task_map.resolve(task)).float().unsqueeze(0)


def _only_task(task_map: TaskMap) -> str | None:
    return next(iter(task_map.ids)) if len(task_map.ids) == 1 else None


def _decided(mount: Mount, task: str | None, names: Sequence[str]) -> Tensor:
    gate, task_map, config = mount.leader.gate, mount.task_map, mount.config
    scope, tasks = config.gate.scope, ", ".join(task_map.ids)
    if task is None and scope == "task":
        task = _only_task(task_map)
    task_id = None if task is None else task_map.resolve(task)
    if gate is None:
        if task_id is None:
            what = "the weights depend on the task id; name one: merge_and_unload(task=...)."
            raise UndecidedError(f"{what} Tasks: {tasks}.")
        chosen = task_map.experts_of(task_id)
        return torch.tensor([[chosen.get(i, 0.0) for i in range(len(names))]])
    visible = None if task_id is None else task_map.visible(task_id, own_only=True)
    alone = config.num_experts == 1 or (visible is not None and len(visible) == 1)
    if alone and config.gate.alone_is_one and not task_map.always:
        only = 0 if visible is None else visible[0]
        return torch.tensor([[float(i == only) for i in range(len(names))]])
    if scope == "constant" and task_id is not None:
        raise ConfigError("a constant gate gives all tasks the same weights; leave the task out.")
    if scope == "task" and task_id is None:
        raise UndecidedError(f"the weights depend on the task; name one: task=... Tasks: {tasks}.")
    if scope in ("constant", "task"):
        return _of_gate(gate, task_map, task_id, visible)
    text = f"the gate's weights depend on the input (gate.scope={scope!r}), so no merged weight equals the mixture."
    hint = (
        "name one expert, or give fixed weights: expert_weights={...}, on the command line --expert NAME; or keep the "
        "adapter unmerged."
    )
    raise UndecidedError(text, hint=hint)


@torch.no_grad()
def _of_gate(gate: Gate, task_map: TaskMap, task_id: int | None, visible: tuple[int, ...] | None) -> Tensor:
    """What a gate that reads nothing, or a task only, decides in eval mode, (splits, expert)."""
    training = gate.training
    gate.eval()
    tasks = None if task_id is None else TaskIds(torch.tensor([task_id]), task_id, has_base=False)
    like = next(gate.parameters())
    routing = route(like.new_zeros(1, 1), gate, task_map, tasks, Call(), visible)
    gate.train(training)
    weights = routing.weights
    if routing.experts is not None:
        columns = torch.tensor(routing.experts, device=weights.device)
        weights = weights.new_zeros(len(weights), len(task_map.experts)).index_copy(1, columns, weights)
    return weights.cpu()

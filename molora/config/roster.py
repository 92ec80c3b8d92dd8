"""Roster: one table of an adapter's experts and tasks, changed only by pure functions.

A MoLoraConfig keeps the same facts as lists by name, as its file has them: `Roster.of` reads them, `write` puts them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molora.config.gate import GateSettings
from molora.config.mixture import ExpertSpec, SavedMixture
from molora.config.names import check_name
from molora.config.suggest import options
from molora.errors import ConfigError

Share = Sequence[str] | Mapping[str, float]
"""A task's experts: equal ones by name, or each with its weight."""


@dataclass(frozen=True)
class ExpertRow:
    """One expert."""

    name: str
    frozen: bool = False  # it does not train
    free_row: bool = False  # its gate row trains although it is frozen
    isolated: bool = False  # older tasks do not see it
    spec: ExpertSpec | None = None  # rank and scaling, where they are its own
    block: int = 0  # experts of one block have their gate rows in one Parameter


@dataclass(frozen=True)
class TaskRow:
    """One task: its id, the experts it has, and the one that was added for it."""

    id: int
    experts: Share
    own: str | None = None


@dataclass(frozen=True)
class Roster:
    """All experts in their order, and all tasks by name."""

    experts: tuple[ExpertRow, ...]
    tasks: Mapping[str, TaskRow]
    next_task_id: int = 0  # ids are not used again
    frozen_extras: bool = False  # plain LoRAs and heads are frozen too

    @classmethod
    def of(cls, mixture: SavedMixture) -> Roster:
        """What a checked config says of its experts and tasks."""
        blocks = {name: i for i, block in enumerate(mixture.gate_blocks or []) for name in block}
        experts = tuple(
            ExpertRow(
                name,
                name in mixture.frozen_experts,
                name in mixture.free_rows,
                name in mixture.isolated_experts,
                mixture.expert_specs.get(name),
                blocks.get(name, 0),
            )
            for name in mixture.experts
        )
        ids = mixture.task_ids or {}
        own = mixture.added_for
        tasks = {
            task: TaskRow(ids[task], share, own.get(task)) for task, share in (mixture.tasks or {}).items()
        }
        return cls(experts, tasks, mixture.next_task_id or 0, mixture.frozen_extras)

    @property
    def names(self) -> list[str]:
        """The experts' names in order."""
        return [row.name for row in self.experts]

    def index(self, name: str) -> int:
        """Where an expert stands; ConfigError where there is none of that name."""
        names = self.names
        if name not in names:
            raise ConfigError(f"no expert {name!r}.{options(name, names, 'Experts')}")
        return names.index(name)

    def task_frozen(self, task: str) -> bool:
        """Whether nothing of a task's own learns: all of its experts, and their gate rows, are frozen."""
        still = {row.name for row in self.experts if row.frozen and not row.free_row}
        return still.issuperset(self.tasks[task].experts)

    def write(self, mixture: SavedMixture) -> None:
        """Make a config say the same, with a gate that fits so many experts."""
        rows, names = self.experts, self.names
        if len(rows) != mixture.num_experts:
            for field, value in fitting(mixture.gate, len(rows)).items():
                setattr(mixture.gate, field, value)
        mixture.num_experts, mixture.expert_names = len(rows), names
        mixture.frozen_experts = [row.name for row in rows if row.frozen]
        mixture.free_rows = [row.name for row in rows if row.free_row]
        mixture.isolated_experts = [row.name for row in rows if row.isolated]
        mixture.expert_specs = {row.name: row.spec for row in rows if row.spec is not None}
        blocks = sorted({row.block for row in rows})
        mixture.gate_blocks = [[row.name for row in rows if row.block == block] for block in blocks]
        mixture.always_on = {name: w for name, w in mixture.always_on.items() if name in names}
        mixture.tasks = {name: _copied(task.experts) for name, task in self.tasks.items()}
        mixture.task_ids = {name: task.id for name, task in self.tasks.items()}
        mixture.added_for = {name: task.own for name, task in self.tasks.items() if task.own is not None}
        mixture.next_task_id, mixture.frozen_extras = self.next_task_id, self.frozen_extras


def added(
    roster: Roster,
    name: str,
    tasks: Sequence[str] = (),
    *,
    learned: bool,
    spec: ExpertSpec | None = None,
    freeze_others: bool = True,
    isolate: bool = False,
) -> Roster:
    """The roster with one more expert.

    Args:
        tasks: those it serves. Known ones gain it; new ones get the next id.
        learned: whether the gate learns: then a new task has every expert, else the new one only.
        spec: rank and scaling of its own.
        freeze_others: freeze all other experts with their gate rows, plain LoRAs and heads.
        isolate: hide it from older tasks.

    Raises:
        ConfigError: the name is none or taken, or a task is named twice.
    """
    check_name(name, "expert")
    for i, task in enumerate(tasks):
        check_name(task, "task")
        if task in tasks[:i]:
            raise ConfigError(f"tasks names {task!r} twice.")
    if name in roster.names:
        raise ConfigError(f"there is an expert {name!r} already. Experts: {', '.join(roster.names)}.")
    others = roster.experts
    if freeze_others:
        others = tuple(replace(row, frozen=True, free_row=False) for row in others)
    block = 1 + max((row.block for row in others), default=-1)
    experts = (*others, ExpertRow(name, isolated=isolate, spec=spec, block=block))
    known, free = dict(roster.tasks), roster.next_task_id
    for task in tasks:
        if task in known:
            known[task] = replace(known[task], experts=_with(known[task].experts, name))
        else:
            known[task] = TaskRow(free, [row.name for row in experts] if learned else [name], own=name)
            free += 1
    return Roster(experts, known, free, roster.frozen_extras or freeze_others)


def weighed(roster: Roster, tasks: Mapping[str, Mapping[str, float]]) -> Roster:
    """The roster where tasks that there are have these experts, with these weights.

    Raises:
        ConfigError: no such task or expert, no expert at all, or a weight that is not a positive number.
    """
    for task, share in tasks.items():
        if task not in roster.tasks:
            raise ConfigError(f"no task {task!r}.{options(task, list(roster.tasks), 'Tasks')}")
        if not share:
            raise ConfigError(f"tasks[{task!r}] names no expert; a task needs at least one.")
        for name, weight in share.items():
            roster.index(name)
            if not 0 < weight < float("inf"):
                raise ConfigError(f"the weight of {name} for {task} is {weight}; allowed: positive numbers.")
    changed = {task: replace(roster.tasks[task], experts=dict(share)) for task, share in tasks.items()}
    return replace(roster, tasks={**roster.tasks, **changed})


def removed(roster: Roster, name: str, *, drop_tasks: bool = False) -> Roster:
    """The roster without one expert. Where `drop_tasks` says so, tasks go with it that had it alone or that it was added for.

    Raises:
        ConfigError: no such expert, the last one, or the only one of a task.
    """
    roster.index(name)
    if len(roster.experts) == 1:
        raise ConfigError(f"{name!r} is the only expert left; delete the adapter instead.")
    orphans = [task for task, row in roster.tasks.items() if set(row.experts) == {name}]
    if orphans and not drop_tasks:
        raise ConfigError(
            f"{name!r} is the only expert of task {', '.join(map(repr, orphans))}.",
            hint="give the task another expert first, or pass drop_tasks=True to forget the task as well.",
        )
    came = {task for task, row in roster.tasks.items() if row.own == name}
    gone = {*orphans, *came} if drop_tasks else set()
    kept = {
        task: replace(row, own=None) if task in came else row
        for task, row in roster.tasks.items()
        if task not in gone
    }
    tasks = {task: replace(row, experts=_without(row.experts, name)) for task, row in kept.items()}
    return replace(roster, experts=tuple(row for row in roster.experts if row.name != name), tasks=tasks)


def merged(roster: Roster, names: Sequence[str], into: str, *, spec: ExpertSpec | None = None) -> Roster:
    """The roster with one expert in place of several, for all of their tasks; it stands last.

    Raises:
        ConfigError: no such expert, or the new name is none or taken.
    """
    old = [roster.experts[roster.index(name)] for name in names]
    is_frozen, isolated = all(row.frozen for row in old), all(row.isolated for row in old)
    grown = added(roster, into, learned=False, spec=spec, freeze_others=False, isolate=isolated)
    new = replace(grown.experts[-1], frozen=is_frozen)
    tasks = {
        task: replace(
            row, experts=_joined(row.experts, names, into), own=None if row.own in names else row.own
        )
        for task, row in roster.tasks.items()
    }
    kept = tuple(row for row in roster.experts if row.name not in names)
    return replace(roster, experts=(*kept, new), tasks=tasks)


def frozen(roster: Roster, names: Iterable[str], state: bool = True) -> Roster:
    """The roster with some experts frozen, or training again, together with their gate rows.

    Frozen and training rows of a block become two blocks. With the last frozen expert, plain LoRAs and heads train again.
    """
    chosen = set(names)
    for name in names:
        roster.index(name)
    rows = [replace(e, frozen=state, free_row=False) if e.name in chosen else e for e in roster.experts]
    parts = sorted({(row.block, not row.frozen) for row in rows})
    experts = tuple(replace(row, block=parts.index((row.block, not row.frozen))) for row in rows)
    extras = roster.frozen_extras and any(row.frozen for row in experts)
    return replace(roster, experts=experts, frozen_extras=extras)


def fitting(gate: GateSettings, num_experts: int) -> dict[str, Any]:
    """The fields of a gate that must change for so many experts, and what to."""
    top_k: Any = gate.top_k
    if isinstance(top_k, dict):
        top_k = {pattern: min(k, num_experts) for pattern, k in top_k.items()}
    elif isinstance(top_k, list):
        top_k = [min(k, num_experts) for k in top_k]
    else:
        top_k = min(top_k, num_experts)
    fields = {"top_k": top_k, "min_k": min(gate.min_k, num_experts)}
    # The weight of a single chosen expert is its probability, or the gate would never learn.
    return {**fields, "renorm": "none"} if gate.select == "top_k" and top_k == 1 else fields


def _copied(share: Share) -> Share:
    return dict(share) if isinstance(share, Mapping) else list(share)


def _with(share: Share, name: str) -> Share:
    """A newcomer gets the mean weight; the sum stays."""
    if not isinstance(share, Mapping):
        return [*share, name]
    mean, factor = sum(share.values()) / (len(share) + 1), 1 - 1 / (len(share) + 1)
    return {**{expert: weight * factor for expert, weight in share.items()}, name: mean}


def _without(share: Share, name: str) -> Share:
    """The others keep their proportions; the sum stays."""
    if not isinstance(share, Mapping):
        return [expert for expert in share if expert != name]
    kept = {expert: weight for expert, weight in share.items() if expert != name}
    scale = sum(share.values()) / (sum(kept.values()) or 1.0)
    return {expert: weight * scale for expert, weight in kept.items()}


def _joined(share: Share, names: Sequence[str], into: str) -> Share:
    """The newcomer has the weight that those it replaces had together."""
    weights = dict(share) if isinstance(share, Mapping) else dict.fromkeys(share, 1.0)
    gone = [weights.pop(name) for name in names if name in weights]
    if not gone:
        return share
    if not isinstance(share, Mapping) and (len(gone) == 1 or not weights):
        return [*weights, into]
    total = 1.0 if isinstance(share, Mapping) else len(share)
    return {**{name: weight / total for name, weight in weights.items()}, into: sum(gone) / total}

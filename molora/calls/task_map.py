"""Which tasks an adapter knows, the stable id of each, and the experts each task may use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora.config.suggest import did_you_mean
from molora.errors import RoutingError

BASE_ONLY = -1
"""The task id that asks for no adapter at all."""

TaskRef = str | int | None


def _number(task: object) -> int:
    """A whole number, of any library's type; raises RoutingError for what merely looks like one."""
    kind = str(getattr(task, "dtype", type(task).__name__))
    try:
        if "bool" not in kind:
            return operator.index(task)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise RoutingError(
        f"a task is given by its name or by a whole number, got {task!r} ({kind}).",
        hint="give names, or the numbers in model.task_ids; None or -1 means the base model only.",
    )


_MOST_UNIONS = 1024  # batches of ever new sets of tasks


@dataclass(frozen=True)
class TaskMap:
    """Task names, ids and experts of one adapter; ids are never re-used nor inferred from order."""

    experts: tuple[str, ...]
    ids: dict[str, int]
    weights: dict[str, dict[str, float]]
    isolated: frozenset[str] = frozenset()
    always: dict[str, float | str] = field(
        default_factory=dict
    )  # experts that are always on: weight, or "rest"
    _cache: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _unions: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    _counts: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    _visible: dict[tuple[int, bool], tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    def resolve(self, task: TaskRef) -> int:
        """The id of a task given by name or id; None and -1 mean base only.

        Raises:
            RoutingError: the task is not known; the message names those that are.
        """
        if task is None:
            return BASE_ONLY
        number = None if isinstance(task, str) else _number(task)
        if number == BASE_ONLY:
            return BASE_ONLY
        if isinstance(task, str) and task in self.ids:
            return self.ids[task]
        if number is not None and number in self.ids.values():
            return number
        known = (
            ", ".join(f"{name!r} (id {i})" for name, i in self.ids.items())
            or "none: this adapter declares no tasks"
        )
        suggestion = did_you_mean(task, self.ids) if isinstance(task, str) else ""
        raise RoutingError(
            f"unknown task {task!r}.{suggestion} Known tasks: {known}; None or -1 means the base model only.",
            hint=None
            if self.ids
            else "give no task ids (molora eval: --mode gate): its gate decides without them.",
        )

    def check(self, ids: Sequence[int]) -> None:
        """Raise RoutingError for the first id that no task has."""
        for task_id in ids:
            self.resolve(task_id)

    def name(self, task_id: int) -> str:
        """The name of a known task id."""
        return next(name for name, i in self.ids.items() if i == task_id)

    def only(self, names: Sequence[str]) -> TaskMap:
        """The view of a layer that has only these experts."""
        kept = [expert for expert in self.experts if expert in names]
        return TaskMap(
            tuple(kept),
            self.ids,
            {task: {e: w for e, w in weights.items() if e in kept} for task, weights in self.weights.items()},
            self.isolated,
            {expert: weight for expert, weight in self.always.items() if expert in kept},
        )

    def experts_of(self, task_id: int) -> dict[int, float]:
        """Expert index -> weight of one task, in expert order, those that are always on included."""
        given = self.weights[self.name(task_id)]
        if self.always:
            given = {expert: weight for expert, weight in given.items() if expert not in self.always}
            rest = 1 - max(given.values(), default=0.0)
            given |= {e: rest if w == "rest" else float(w) for e, w in self.always.items()}
        return {index: given[expert] for index, expert in enumerate(self.experts) if expert in given}

    @property
    def gated(self) -> tuple[int, ...] | None:
        """Indices of the experts a gate decides over; None: all."""
        if not self.always:
            return None
        return tuple(i for i, expert in enumerate(self.experts) if expert not in self.always)

    def experts_of_all(self, task_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The experts that any of these tasks has, in expert order."""
        if task_ids in self._unions:
            return self._unions[task_ids]
        found = tuple(sorted({e for i in task_ids if i != BASE_ONLY for e in self.experts_of(i)}))
        if not torch.compiler.is_compiling():  # a cache that tracing fills compiles the model twice
            if len(self._unions) >= _MOST_UNIONS:
                self._unions.clear()
            self._unions[task_ids] = found
        return found

    def most_experts(self, task_ids: Iterable[int] | None) -> int:
        """The largest number of experts that one of these tasks has; None: of all tasks."""
        wanted = self.ids.values() if task_ids is None else {i for i in task_ids if i != BASE_ONLY}
        return max([1, *[self._count(task_id) for task_id in wanted]])  # tracing knows no `default`

    def _count(self, task_id: int) -> int:
        if task_id in self._counts:
            return self._counts[task_id]
        count = len(self.experts_of(task_id))
        if not torch.compiler.is_compiling():  # a cache that tracing fills compiles the model twice
            self._counts[task_id] = count
        return count

    def table(self, device: torch.device) -> Tensor:
        """Weights (task id, expert) of every task, zero rows for ids that no task has."""

        def build() -> Tensor:
            rows = [[0.0] * len(self.experts) for _ in range(max([-1, *self.ids.values()]) + 1)]
            for task_id in self.ids.values():
                for expert, weight in self.experts_of(task_id).items():
                    rows[task_id][expert] = weight
            return torch.tensor(rows, device=device)

        return self._once(str(device), build)

    def shares(self, several: Tensor) -> Tensor:
        """Weights (sample, expert) of samples that have these shares (sample, task id) of several tasks."""
        table = self.table(several.device)
        return several[:, : len(table)] @ table

    def row(self, weights: tuple[float, ...], like: Tensor) -> Tensor:
        """Static weights as a (1, expert) tensor in the gate's dtype on x's device, made once."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = f"{like.device} {dtype} {weights}"
        return self._once(key, lambda: torch.tensor([weights], dtype=dtype, device=like.device))

    def _once(self, key: str, build: Callable[[], Tensor]) -> Tensor:
        """A constant, built once. Tensors made while a graph is traced are symbols: never keep those."""
        if key in self._cache:
            return self._cache[key]
        value = build()
        if not torch.compiler.is_compiling():
            self._cache[key] = value
        return value

    def visible(self, task_id: int, *, own_only: bool) -> tuple[int, ...]:
        """Experts a gate may use for a task: its own set, or all but those isolated from it."""
        if (task_id, own_only) in self._visible:
            return self._visible[task_id, own_only]
        own = self.experts_of(task_id)
        found = tuple(
            index
            for index, expert in enumerate(self.experts)
            if index in own or not (own_only or expert in self.isolated)
        )
        if not torch.compiler.is_compiling():  # a cache that tracing fills compiles the model twice
            self._visible[task_id, own_only] = found
        return found

    def visible_table(self, device: torch.device, *, own_only: bool) -> Tensor:
        """`visible` of every task as a boolean matrix (task id, expert)."""

        def build() -> Tensor:
            rows = [[False] * len(self.experts) for _ in range(max([-1, *self.ids.values()]) + 1)]
            for task_id in self.ids.values():
                for expert in self.visible(task_id, own_only=own_only):
                    rows[task_id][expert] = True
            return torch.tensor(rows, device=device)

        return self._once(f"{device} visible {own_only}", build)

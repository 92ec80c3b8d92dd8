"""TaskRouter: what an adapter knows of its tasks' prompts, as tensors of its own, and which task it takes a prompt for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from molora.calls.task_router import Gaussian, TaskStatistics
from molora.config.choices import ROUTERS
from molora.config.router import RouterSettings

_HELD_OUT = 10  # one prompt of so many tells how unlike its own task a prompt may be
_ROUNDING = 1e-3  # of a log density, whose features are float32 means over a batch of any shape


class Guess(NamedTuple):
    """The task of some prompts. Tasks are those that were learned, in the order of `ids`."""

    ids: list[int]  # (task,)
    posteriors: Tensor  # (sample, task) rows sum to 1
    nearest: Tensor  # (sample,) which of `ids` is the likeliest
    log_densities: Tensor  # (sample,) under that task
    known: Tensor  # (sample,) bool: no less like that task than what counts as known


class TaskRouter(nn.Module):
    """Statistics of the features of each task's prompts, a row for each task's centre, in float64 always.

    Buffers, so that they are saved, loaded and moved with the adapter. A task that was not learned has counts of 0.

    Args:
        settings: the config's router.
        ids: the adapter's task ids, in the order of their rows.
        d: width of the features.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor
    spread: Tensor
    floors: Tensor

    def __init__(self, settings: RouterSettings, ids: Sequence[int], d: int) -> None:
        super().__init__()
        self.settings, self.ids = settings, list(ids)
        self._namer: Gaussian | None = None
        self._learned: list[int] | None = None
        self.kind: type[Gaussian] = ROUTERS[settings.kind]
        self.centres = settings.clusters if self.kind.clustered else 1  # rows per task
        for name, value in _tensors(TaskStatistics.of(len(self.ids) * self.centres, d)).items():
            self.register_buffer(name, value)
        # (task,) the log density below which a prompt is none of the task's; it moves with the density's peak
        self.register_buffer("floors", torch.zeros(len(self.ids), dtype=torch.float64))

    @property
    def statistics(self) -> TaskStatistics:
        """What is known, as plain data."""
        return TaskStatistics(self.counts, self.means, self.scatter, self.spread)

    @property
    def seen(self) -> dict[int, int]:
        """How many prompts of each task it has learned from, by id."""
        return dict(zip(self.ids, self._by_task(self.counts).sum(dim=1).long().tolist(), strict=True))

    @property
    def learned(self) -> list[int]:
        """Ids of the tasks it has learned."""
        if self._learned is None:  # asked in every forward: a GPU is asked once
            self._learned = [i for i, count in self.seen.items() if count]
        return self._learned

    def learn(self, prompts: Mapping[int, Sequence[Tensor]]) -> None:
        """Add features of more prompts, by task id and centre; order and splitting do not matter to the names.

        What counts as known is measured first, on one prompt of ten that the other nine have not shown yet. It is a distance
        from the task's mean: later tasks widen the common spread and so lower every density, which must make no prompt
        of this task unknown.

        Args:
            prompts: for each task the features (sample, d) of each of its centres, at most `centres`.
        """
        before, peak = self.statistics, self._peak()
        self._learn_all({task: [x[_shown(x)] for x in groups] for task, groups in prompts.items()})
        distances = self.floors - peak
        for task, groups in prompts.items():
            held = torch.cat([x[~_shown(x)] for x in groups])
            held = held if len(held) else torch.cat([*groups])
            found = self._log_densities(held)[:, self.learned.index(task)]
            distances[self.ids.index(task)] = found.quantile(self.settings.quantile) - self._peak()
        self._keep(before)
        self._learn_all(prompts)
        self.floors = distances + self._peak()

    def _peak(self) -> Tensor:
        """() the log density at a task's mean, the same for all; 0 before any was learned."""
        return self.namer.constant if self.learned else self.floors.new_zeros(())

    def _learn_all(self, prompts: Mapping[int, Sequence[Tensor]]) -> None:
        statistics = self.statistics
        for task, groups in prompts.items():
            first = self.ids.index(task) * self.centres
            for row, x in enumerate(groups, first):
                statistics = statistics.learned(row, self.kind.prepared(x.to(self.means)))
        self._keep(statistics)

    def set_tasks(self, ids: Sequence[int]) -> None:
        """Be the router of these tasks: rows of new ones are empty, those of others are dropped.

        A dropped task's share of the spread around the means, which all tasks have in common, stays.
        """
        kept = [self.ids.index(i) if i in self.ids else None for i in ids]
        floors = [self.floors[row] if row is not None else self.floors.new_zeros(()) for row in kept]
        statistics = self.statistics.rows(self._rows(kept))
        self.ids, self.floors = list(ids), torch.stack(floors) if floors else self.floors[:0]
        self._keep(statistics)

    @property
    def namer(self) -> Gaussian:
        """The kind, over the tasks learned so far."""
        if self._namer is None:
            places = self._rows([self.ids.index(i) for i in self.learned])
            known = self.statistics.rows(places)
            self._namer = self.kind(known, self.settings.shrinkage, self.centres)
        return self._namer

    @torch.no_grad()
    def guess(self, features: Tensor) -> Guess:
        """The task of each row of features (sample, d). Some task must have been learned."""
        posteriors = self.namer.posteriors(self.kind.prepared(features.to(self.means)))
        nearest = posteriors.argmax(dim=1)
        density = self._log_densities(features).gather(1, nearest.unsqueeze(1)).squeeze(1)
        floors = self.floors[[self.ids.index(i) for i in self.learned]]
        return Guess(self.learned, posteriors, nearest, density, density >= floors[nearest] - _ROUNDING)

    def named(self, guess: Guess) -> list[int | None]:
        """The task id of each prompt of a guess; None for those that are like no task, where the settings tell them apart."""
        apart = self.settings.unknown != "nearest"
        rows = zip(guess.nearest.tolist(), guess.known.tolist(), strict=True)
        return [None if apart and not known else guess.ids[row] for row, known in rows]

    def strangers(self, task: int | None, features: Tensor) -> float | None:
        """Share of features (sample, d) of a task that would not count as known if this task were not; None: no other is."""
        others = deepcopy(self)
        others.set_tasks([i for i in self.learned if i != task])
        return float((~others.guess(features).known).double().mean()) if others.ids else None

    def centre_of(self, task: int, features: Tensor) -> Tensor:
        """(sample,) the nearest centre of a task that was learned to each row of features (sample, d)."""
        rows = range(self.ids.index(task) * self.centres, (self.ids.index(task) + 1) * self.centres)
        known = self.statistics.rows([*rows])
        apart = torch.cdist(self.kind.prepared(features.to(self.means)), known.means)
        return apart.masked_fill(known.counts == 0, torch.inf).argmin(dim=1)

    def _log_densities(self, features: Tensor) -> Tensor:
        return self.namer.log_densities(self.kind.prepared(features.to(self.means)))

    def _by_task(self, rows: Tensor) -> Tensor:
        """Something of each row, (task, centre)."""
        return rearrange(rows, "(task centre) -> task centre", centre=self.centres)

    def _rows(self, tasks: Sequence[int | None]) -> list[int | None]:
        """The rows of tasks, which are given by their places."""
        return [
            None if task is None else task * self.centres + centre
            for task in tasks
            for centre in range(self.centres)
        ]

    def _keep(self, statistics: TaskStatistics) -> None:
        for name, value in _tensors(statistics).items():
            setattr(self, name, value)

    # -- whatever changes the tensors ------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self._forget()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._forget()

    def _forget(self) -> None:
        self._namer = self._learned = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To other devices, but never to another dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                lost = value.is_meta or moved.is_meta
                self._buffers[name] = moved.to(value.dtype) if lost else value.to(moved.device)
        self._forget()
        return self


def _shown(features: Tensor) -> Tensor:
    """(sample,) true but for the prompts that are held out at first."""
    return torch.arange(len(features), device=features.device) % _HELD_OUT != _HELD_OUT - 1


def _tensors(statistics: TaskStatistics) -> dict[str, Tensor]:
    return {f.name: getattr(statistics, f.name) for f in fields(statistics)}

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
from molora.errors import DataError

_ANYTHING = 1e300  # half a squared distance within which everything is; state must be finite
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
            self._learned = [self.ids[place] for place in self._places(self.statistics)]
        return self._learned

    def learn(self, prompts: Mapping[int, Sequence[Tensor]]) -> None:
        """Add features of more prompts, by task id and centre; order and splitting do not matter to the names.

        What counts as known is what is no further from its task than most of the prompts, each measured as if it had not been
        learned. That is a distance in units of the common spread, which later tasks change: the distances of the older ones
        are converted as that of their common covariance is. More prompts of a task can only widen what is known.

        Args:
            prompts: for each task the features (sample, d) of each of its centres, at most `centres`.

        Raises:
            DataError: features that have no spread in some direction under so little shrinkage.
        """
        statistics = self.statistics
        groups = {
            self.ids.index(task) * self.centres + centre: self.kind.prepared(x.to(self.means))
            for task, given in prompts.items()
            for centre, x in enumerate(given)
        }
        for row, x in groups.items():
            statistics = statistics.learned(row, x)
        later = self._namer_of(statistics)
        reach = self._converted(later)
        for task in prompts:
            place = self.ids.index(task)
            known = self._reach(later, statistics, groups, place)
            told = task in self.learned and reach[place] < _ANYTHING
            reach[place] = torch.maximum(reach[place], known) if told else known
        self._keep(statistics)
        self.floors = later.constant - reach

    def _converted(self, later: Gaussian) -> Tensor:
        """(task,) half the squared distance that counts as known so far, in units of a later spread."""
        if not self.learned:
            return torch.zeros_like(self.floors)
        common = self.scatter / self.spread
        ratio = later.mean_square(common) / self.namer.mean_square(common)
        reach = self.namer.constant - self.floors
        later_reach = reach * torch.where(torch.isfinite(ratio), ratio, 1.0)
        return torch.where(reach < _ANYTHING, later_reach, reach)

    def _reach(
        self, later: Gaussian, statistics: TaskStatistics, groups: Mapping[int, Tensor], place: int
    ) -> Tensor:
        """() half the squared distance within which nearly all of a task's prompts would be known that were not learned."""
        counts, first = later.known.counts.tolist(), self._places(statistics).index(place) * self.centres
        own = [centre for centre in range(self.centres) if counts[first + centre]]
        found = []
        for centre in own:
            others = [first + other for other in own if other != centre]
            if (x := groups.get(place * self.centres + centre)) is not None:
                found.append(later.left_out(first + centre, x, others).amin(dim=1))
        # One prompt does not tell how alike the others will be.
        return torch.cat(found).clamp(max=_ANYTHING).quantile(1 - self.settings.quantile)

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
            self._namer = self._namer_of(self.statistics)
        return self._namer

    def _namer_of(self, statistics: TaskStatistics) -> Gaussian:
        known = statistics.rows(self._rows(self._places(statistics)))
        try:
            return self.kind(known, self.settings.shrinkage, self.centres)
        except torch.linalg.LinAlgError as error:
            raise DataError(
                f"router.shrinkage={self.settings.shrinkage} is too small for so few prompts: their covariance has no inverse.",
                hint="leave it at auto, or give more prompts.",
            ) from error

    def _places(self, statistics: TaskStatistics) -> list[int]:
        """Places of the tasks that were learned."""
        counts = self._by_task(statistics.counts).sum(dim=1).tolist()
        return [place for place, count in enumerate(counts) if count]

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


def _tensors(statistics: TaskStatistics) -> dict[str, Tensor]:
    return {f.name: getattr(statistics, f.name) for f in fields(statistics)}

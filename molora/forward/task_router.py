"""TaskRouter: what an adapter knows of its tasks' prompts, as tensors of its own, and which task it takes a prompt for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from molora.calls.task_router import Gaussian, TaskStatistics
from molora.config.choices import ROUTERS
from molora.config.router import RouterSettings

_HELD_OUT = 10  # one prompt of so many tells how unlike its own task a prompt may be


class Guess(NamedTuple):
    """The task of some prompts. Tasks are those that were learned, in the order of `ids`."""

    ids: list[int]  # (task,)
    posteriors: Tensor  # (sample, task) rows sum to 1
    nearest: Tensor  # (sample,) which of `ids` is the likeliest
    log_densities: Tensor  # (sample,) under that task
    known: Tensor  # (sample,) bool: no less like that task than what counts as known


class TaskRouter(nn.Module):
    """Statistics of the features of each task's prompts, a row for each task of the adapter, in float64 always.

    Buffers, so that they are saved, loaded and moved with the adapter. A task that was not learned has count 0.

    Args:
        settings: the config's router.
        ids: the adapter's task ids, one per row.
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
        for name, value in _tensors(TaskStatistics.of(len(self.ids), d)).items():
            self.register_buffer(name, value)
        # (task,) the log density below which a prompt is none of the task's
        self.register_buffer("floors", torch.zeros(len(self.ids), dtype=torch.float64))

    @property
    def statistics(self) -> TaskStatistics:
        """What is known, as plain data."""
        return TaskStatistics(self.counts, self.means, self.scatter, self.spread)

    @property
    def learned(self) -> list[int]:
        """Ids of the tasks it has learned."""
        return [i for i, count in zip(self.ids, self.counts.tolist(), strict=True) if count]

    def learn(self, prompts: dict[int, Tensor]) -> None:
        """Add features (sample, d) of more prompts, by task id; order and splitting do not matter to the names.

        What counts as known is measured first, on one prompt of ten that the other nine have not shown yet.
        """
        before = self.statistics
        for task, features in prompts.items():
            self._keep(self.statistics.learned(self.ids.index(task), features[_shown(features)]))
        floors = self.floors.clone()
        for task, features in prompts.items():
            held = features[~_shown(features)]
            held = held if len(held) else features
            row = self.learned.index(task)
            found = self.namer.log_densities(held)[:, row]
            floors[self.ids.index(task)] = found.quantile(self.settings.quantile)
        self.floors = floors
        self._keep(before)
        for task, features in prompts.items():
            self._keep(self.statistics.learned(self.ids.index(task), features))

    def set_tasks(self, ids: Sequence[int]) -> None:
        """Be the router of these tasks: rows of new ones are empty, those of others are dropped.

        A dropped task's share of the spread around the means, which all tasks have in common, stays.
        """
        kept = [self.ids.index(i) if i in self.ids else None for i in ids]
        floors = [self.floors[row] if row is not None else self.floors.new_zeros(()) for row in kept]
        statistics = self.statistics.rows(kept)
        self.ids, self.floors = list(ids), torch.stack(floors) if floors else self.floors[:0]
        self._keep(statistics)

    @property
    def namer(self) -> Gaussian:
        """The kind, over the tasks learned so far."""
        if self._namer is None:
            seen = self.statistics.rows(self.counts.nonzero().flatten().tolist())
            self._namer = ROUTERS[self.settings.kind](seen, self.settings.shrinkage)
            assert self._namer is not None
        return self._namer

    @torch.no_grad()
    def guess(self, features: Tensor) -> Guess:
        """The task of each row of features (sample, d). Some task must have been learned."""
        features = features.to(self.means)
        posteriors, densities = self.namer.posteriors(features), self.namer.log_densities(features)
        nearest = posteriors.argmax(dim=1)
        density = densities.gather(1, nearest.unsqueeze(1)).squeeze(1)
        floors = self.floors[self.counts > 0]
        return Guess(self.learned, posteriors, nearest, density, density >= floors[nearest])

    def _keep(self, statistics: TaskStatistics) -> None:
        for name, value in _tensors(statistics).items():
            setattr(self, name, value)

    # -- whatever changes the tensors ------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self._namer = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._namer = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To other devices, but never to another dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                lost = value.is_meta or moved.is_meta
                self._buffers[name] = moved.to(value.dtype) if lost else value.to(moved.device)
        self._namer = None
        return self


def _shown(features: Tensor) -> Tensor:
    """(sample,) true but for the prompts that are held out at first."""
    return torch.arange(len(features), device=features.device) % _HELD_OUT != _HELD_OUT - 1


def _tensors(statistics: TaskStatistics) -> dict[str, Tensor]:
    return {f.name: getattr(statistics, f.name) for f in fields(statistics)}

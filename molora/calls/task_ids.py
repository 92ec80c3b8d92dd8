"""TaskIds: the tasks of a batch, resolved from names to ids, and spread over its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from molora.calls.request import TaskIdsLike
from molora.calls.task_map import BASE_ONLY, TaskMap, TaskRef
from molora.errors import RoutingError


@dataclass(frozen=True)
class TaskIds:
    """Resolved task ids: `ids` (batch,) or (batch, seq) int64; `single` where one id holds for all.

    Samples of several tasks at once have the first of them in `ids`, and all of them in `several`. `listed` is one id
    per sample as numbers, and `named` all ids that occur, where they are known
    without asking a device; `most` the largest number of experts that the tasks of one sample in `several` have.
    """

    ids: Tensor
    single: int | None
    has_base: bool = True  # whether some id may be -1 (unknown while compiling)
    several: Tensor | None = None  # (batch, task id) each sample's share of each task; rows sum to 1
    listed: tuple[int, ...] | None = None
    named: tuple[int, ...] | None = None
    most: int | None = None

    @property
    def known(self) -> tuple[int, ...] | None:
        """`listed`, but for a graph that is traced: it would be one for these tasks only."""
        return None if torch.compiler.is_compiling() else self.listed

    @property
    def all_base(self) -> bool:
        """Whether the whole batch asks for the base model only."""
        return self.single == BASE_ONLY

    @property
    def some_base(self) -> bool:
        """Whether samples that ask for the base only may stand beside others."""
        return self.single is None and self.has_base

    def without_shortcut(self) -> TaskIds:
        """The same ids, those for the base only routed like any others, with weight zero."""
        return replace(self, single=None) if self.all_base else self

    def shares(self, size: int, device: torch.device) -> Tensor:
        """Each sample's share of each task id below `size`, (batch, task) float32; zero rows for the base only."""
        if self.several is not None:
            several = self.several.to(device)
            return torch.nn.functional.pad(several, (0, size - several.shape[1]))
        if self.ids.dim() != 1:
            raise RoutingError(
                "this gate learns from the task of a sample, but task ids were given per token; give one per sample."
            )
        ids = (self.ids if self.single is None else self.ids[:1]).to(device)
        return (ids.unsqueeze(-1) == torch.arange(size, device=device)).float()

    def expand(self, lead: torch.Size) -> Tensor:
        """Ids of every token for an input of shape (*lead, d): (tokens,) int64.

        Beam search and several return sequences repeat each sample in place, so the batch may be a
        multiple of the ids given. Raises RoutingError when it is not.
        """
        ids = self.ids
        if ids.shape == lead:
            return ids.reshape(-1)
        if ids.dim() == 2 and lead.numel() == ids.numel() and len(lead) == 1:
            return ids.reshape(-1)
        ids = ids.repeat_interleave(self.repeats(lead[0]), dim=0)
        if ids.dim() == 1:
            ids = ids.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
        elif len(lead) == 2 and ids.shape[1] >= lead[1]:  # a decoding step sees the newest positions only
            ids = ids[:, -lead[1] :]
        else:
            raise RoutingError(
                f"task ids of shape {tuple(self.ids.shape)} do not fit an input of shape {tuple(lead)}."
            )
        return ids.reshape(-1)

    def repeats(self, batch: int) -> int:
        """How often each sample stands in a batch, in place; raises RoutingError where they do not fit."""
        samples = self.ids.shape[0]  # not len, which would fix the size of an exported model
        if batch % samples:
            raise RoutingError(
                f"got task ids for {samples} samples, but the batch has {batch}; give one id per sample."
            )
        return batch // samples

    def asked(self, lead: torch.Size, device: torch.device) -> Tensor:
        """(tokens, 1) that is 0 for tokens that ask for the base model only."""
        return base_only(self.expand(lead).to(device))


def base_only(ids: Tensor) -> Tensor:
    """Mask (tokens, 1) that is 0 for ids that ask for the base model only."""
    return (ids != BASE_ONLY).unsqueeze(-1)


def spread(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """Rows of samples (batch, ...) as rows of tokens, for an input of shape (*lead, d).

    One row serves everything, as many rows as tokens stay as they are. The batch may be a multiple of the rows:
    beams and several return sequences repeat each sample in place.
    """
    tokens = prod(lead)
    if len(rows) in (1, tokens):
        return rows
    check_samples(rows, lead)
    return rows.repeat_interleave(tokens // len(rows), dim=0)


def check_samples(rows: Tensor, lead: Sequence[int]) -> None:
    """Raise RoutingError where rows (samples, ...) are not those of an input of shape (*lead, d)."""
    if lead[0] % len(rows):
        raise RoutingError(
            f"got routing inputs for {len(rows)} samples, but the batch has {lead[0]}; give one per sample."
        )


def resolve_ids(task_map: TaskMap, given: TaskIdsLike) -> TaskIds:
    """Names and ids as a caller gives them to `TaskIds`; raises RoutingError for unknown tasks and wrong shapes."""
    if isinstance(given, Tensor):
        if given.numel() == 0:
            raise RoutingError("task_ids is empty; give one name or id per sample.")
        return _of_tensor(task_map, given)
    if isinstance(given, Mapping):
        raise RoutingError(
            f"task_ids is a map, {dict(given)!r}; give one name or id per sample.",
            hint="routing(model, experts={name: weight}) weighs experts.",
        )
    listed: Any = [given] if isinstance(given, str) or not hasattr(given, "__len__") else given
    if len(listed) == 0:
        raise RoutingError("task_ids is empty; give one name or id per sample.")
    if any(isinstance(task, (list, tuple)) for task in listed):
        return _several(task_map, [t if isinstance(t, (list, tuple)) else [t] for t in listed])
    resolved = [task_map.resolve(task) for task in listed]
    single = resolved[0] if len(set(resolved)) == 1 else None
    named = tuple(sorted(set(resolved)))
    return TaskIds(torch.tensor(resolved), single, BASE_ONLY in resolved, listed=tuple(resolved), named=named)


def weighed_ids(task_map: TaskMap, first: Sequence[int], tasks: Sequence[int], weights: Tensor) -> TaskIds:
    """Samples of several tasks by weights (sample, task), whose columns are `tasks`; `first`: each sample's first task."""
    shares = weights.new_zeros(len(weights), max([0, *task_map.ids.values()]) + 1)
    shares[:, list(tasks)] = weights
    most = len(task_map.experts_of_all(tuple(sorted(tasks))))
    named = tuple(sorted({*tasks, *first}))
    return TaskIds(torch.tensor(first), None, BASE_ONLY in first, shares, named=named, most=most)


def _of_tensor(task_map: TaskMap, given: Tensor) -> TaskIds:
    ids = given.reshape(1) if given.dim() == 0 else given
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 2:
        raise RoutingError(
            f"task ids must be integers of shape (batch,) or (batch, seq), got {ids.dtype} {tuple(ids.shape)}."
        )
    # Reading values would break a graph that is traced; there the caller owns their validity.
    if torch.compiler.is_compiling():
        return TaskIds(ids.long(), None)
    listed = tuple(ids.flatten().tolist())
    values = tuple(sorted(set(listed)))
    task_map.check(values)
    single = values[0] if len(values) == 1 else None
    by_sample = listed if ids.dim() == 1 else None
    return TaskIds(ids.long(), single, BASE_ONLY in values, listed=by_sample, named=values)


def _several(task_map: TaskMap, given: Sequence[Sequence[TaskRef]]) -> TaskIds:
    """Samples with several tasks each: every task has an equal share."""
    shares = torch.zeros(len(given), max([0, *task_map.ids.values()]) + 1)
    first, named, most = [], set(), 1
    for row, tasks in enumerate(given):
        if not tasks:
            raise RoutingError(f"sample {row} has an empty list of tasks; use None for the base only.")
        resolved = [task_map.resolve(task) for task in tasks]
        if BASE_ONLY in resolved and len(resolved) > 1:
            raise RoutingError(f"sample {row} asks for tasks and for the base only.")
        for task in resolved:
            if task != BASE_ONLY:
                shares[row, task] += 1 / len(resolved)
        first.append(resolved[0])
        named.update(resolved)
        most = max(most, len(task_map.experts_of_all(tuple(sorted(set(resolved))))))
    all_of_them = tuple(sorted(named))
    return TaskIds(torch.tensor(first), None, BASE_ONLY in first, shares, named=all_of_them, most=most)

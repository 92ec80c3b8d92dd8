"""Loaders: one for training that resumes at the exact batch, and one that reads in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from molora.data.mixing import Halves, epoch_order, mixing_counts, shard, this_process
from molora.data.prompts import Example
from molora.errors import ConfigError

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Example]], Batch]


class ResumableLoader:
    """Batches of shuffled, mixed tasks: an endless stream of epochs, and a position in it.

    Iterating runs from the position to the end of its epoch. With an epoch's last batch the position enters the next
    epoch, since Lightning never asks a sized loader for one batch more. It counts batches handed out, whatever workers
    read ahead. The order is a pure function of (seed, epoch), and no global random state is read or moved. Nothing is
    dropped: an epoch's last batch may be smaller. In distributed training each process gets its share, all equally
    many batches. It is not a DataLoader, so Lightning leaves its order and sharding alone.

    With `halves`, each batch is of one half of every task's records: see `Halves`.

    `last` is the epoch and number of the batch handed out last, and `left_out` those that nothing shall be learned from.
    They are handed out all the same, so that all else stays as it was.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[Example]],
        batch_size: int,
        collate: Collate,
        *,
        seed: int = 0,
        mixing: str = "size",
        temperature: float = 2.0,
        weights: Sequence[float] | None = None,
        workers: int = 0,
        left_out: set[tuple[int, int]] | None = None,
        halves: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
        if not tasks or not all(len(examples) for examples in tasks):
            raise ConfigError("every task of a loader needs at least one example.")
        self.examples = [example for examples in tasks for example in examples]
        self.sizes = [len(examples) for examples in tasks]
        self.counts = mixing_counts(self.sizes, mixing, temperature, weights)
        self.halves = Halves(self.sizes, self.counts, seed) if halves else None
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.workers = workers
        self.epoch = 0
        self.given = 0  # batches of this epoch handed out
        self.last: tuple[int, int] | None = None
        self.left_out = set() if left_out is None else left_out

    def __len__(self) -> int:
        """Batches in an epoch, on this and on every other process."""
        return sum(self._numbers())

    def _numbers(self) -> list[int]:
        """How many batches an epoch has, of each half where there are halves."""
        parts = [sum(self.counts)] if self.halves is None else self.halves.records
        shares = [-(-records // this_process()[1]) for records in parts]
        return [-(-share // self.batch_size) for share in shares]

    def batches(self, epoch: int) -> list[list[int]]:
        """The example indices of every batch of an epoch on this process."""
        if self.halves is None:
            return self._cut(epoch_order(self.sizes, self.counts, self.seed, epoch))
        parts = [self._cut(self.halves.order(half, epoch)) for half in (0, 1)]
        return [parts[half].pop(0) for half in map(self.half_of, range(len(self)))]

    def _cut(self, order: Tensor) -> list[list[int]]:
        mine = shard(order, *this_process()).tolist()
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]

    def half_of(self, number: int) -> int:
        """Of which half the batch of that number in an epoch is, 0 or 1: they take turns, 1 first, until one is through."""
        shorter = min(self._numbers())
        return (number + 1) % 2 if number < 2 * shorter else int(self._numbers()[1] > shorter)

    @property
    def half(self) -> int | None:
        """Which half of the records the batch handed out last is of; None where there are no halves."""
        return None if self.halves is None or self.last is None else self.half_of(self.last[1])

    def __iter__(self) -> Iterator[Batch]:
        epoch, total = self.epoch, len(self)
        rest: DataLoader[Example] = DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=self.batches(epoch)[self.given :],
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )
        for batch in rest:
            self.last = epoch, self.given
            self.given += 1
            if self.given == total:
                self.epoch, self.given = epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, the settings it is valid for, and what is left out; plain data."""
        left_out = {"left_out": [list(place) for place in sorted(self.left_out)]} if self.left_out else {}
        return {"epoch": self.epoch, "batches": self.given, "made_for": self._made_for(), **left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises ConfigError inside an epoch that this loader would batch differently."""
        then = state["made_for"]
        both = [(key, then.get(key), now) for key, now in self._made_for().items()]
        changed = [f"{key}: {old} then, {now} now" for key, old, now in both if old != now]
        if state["batches"] and changed:
            raise ConfigError(
                f"cannot go on in the middle of an epoch that was cut differently ({'; '.join(changed)}).",
                hint="resume with the data, batch_size, seed and number of processes the run was started with",
            )
        self.epoch, self.given = state["epoch"], state["batches"]
        self.left_out.update((epoch, number) for epoch, number in state.get("left_out", ()))

    def _made_for(self) -> dict[str, Any]:
        return {
            "records per task": list(self.counts),
            "task sizes": list(self.sizes),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "processes": this_process()[1],
        }


def ordered_loader(
    examples: Sequence[Example], batch_size: int, collate: Collate, *, workers: int = 0
) -> DataLoader[Example]:
    """A loader that reads every example in order, each process its share; for validation.

    Its generator is its own: a DataLoader without one draws from the global random state at every start.
    """
    return DataLoader(
        list(examples),  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=_InOrder(len(examples)),
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )


class _InOrder(Sampler[int]):
    """0 to n-1, sharded over the processes there are when it is read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return -(-self.size // this_process()[1])

    def __iter__(self) -> Iterator[int]:
        return iter(shard(torch.arange(self.size), *this_process()).tolist())

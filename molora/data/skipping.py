"""`data.on_error: skip`: records that cannot be used are left out, counted, and told of once."""

from __future__ import annotations

import logging
from array import array
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from molora.config import TaskConfig
from molora.data.render import Written, answers_of, render
from molora.data.sources import ChosenRecords, LazyRecords, Split, records_of
from molora.errors import DataError

T = TypeVar("T", bound=Written)

log = logging.getLogger(__name__)


@dataclass
class Faults:
    """Counts what is left out, and keeps the first error; an `OnError`."""

    count: int = 0
    first: DataError | None = None

    def __call__(self, error: DataError) -> None:
        self.first = self.first or error
        self.count += 1


def without_faulty(task: T, config: TaskConfig) -> T:
    """The task with the records that can be read and have what it needs; looked at when they are first used."""
    splits: dict[str, LazyRecords] = {}
    both: tuple[Split, Split] = ("train", "eval")
    for split in both:
        faults = Faults()
        records = records_of(config, split, faults)
        if records is not None:
            splits[split] = LazyRecords(partial(_usable, task, split, records, faults))
    return replace(task, **splits)  # type: ignore[type-var]  # a task is a dataclass


def _usable(task: Written, split: Split, records: LazyRecords, faults: Faults) -> ChosenRecords:
    kept = array("Q")
    read = len(records)  # faults of the file itself are counted here
    for i, record in enumerate(records):
        try:
            render(task, record)
            if split == "eval" and task.choices is not None:
                answers_of(task, record)
        except DataError as error:
            faults(error)
        else:
            kept.append(i)
    unread = faults.count - (read - len(kept))
    total = read + unread
    if faults.count:
        assert faults.first is not None
        log.warning(
            "task %r, %s: %d of %d records are faulty and left out (%.1f %%). The first: %s",
            task.name, split, faults.count, total, 100 * faults.count / total, faults.first.message,
        )  # fmt: skip
    if not kept:
        raise DataError(
            f"task {task.name!r}: none of its {total} {split} records can be used."
        ) from faults.first
    return ChosenRecords(records, kept)

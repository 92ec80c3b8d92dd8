"""pass@k: several answers to each record are drawn, and a command of the user's says of each whether it is right.

The command gets one JSON object on its standard input, `{"prompt": ..., "answer": ..., "record": {...}}`, and ends with 0 for
a right answer and with anything else for a wrong one; so does one that takes longer than the time allowed. What it does with
an answer, which may be a program that a model wrote, is its own business, and so is the sandbox to do it in.

Reference: Chen et al., arXiv:2107.03374 (the estimator without bias).
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any

from molora.config import RunConfig
from molora.config.evaluation import SamplingConfig
from molora.data.records import where_of
from molora.data.render import render
from molora.data.tasks import Task
from molora.errors import ConfigError, DataError
from molora.evaluation.judging import Commands


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """How likely it is that of k answers, drawn from these without putting back, at least one is right."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def check_judges(config: RunConfig, tasks: Iterable[Task]) -> None:
    """Raise ConfigError, before anything is trained, where a task's command cannot judge."""
    for task in tasks:
        if task.check and len(task.eval):
            Judge(task, (config.eval.sampling or SamplingConfig()).timeout)


@dataclass(frozen=True)
class Judge:
    """A task's command and how many seconds it may take for one answer."""

    task: Task
    timeout: float

    def __post_init__(self) -> None:
        """Raises ConfigError where the command cannot be run, or finds the right answer of the first record wrong."""
        record: Mapping[str, Any] = self.task.eval[0]
        told = self._told(record, render(self.task, record)[1])
        with TemporaryFile() as stderr, self._started():
            ended = Commands().run(self.task.check, told, self.timeout, stderr)
            said = _last_line(stderr)
        if ended != 0:
            fault = f"it ended with {ended}" + (f", saying {said!r}." if said else ".")
            if ended is None:
                fault = f"it took longer than {self.timeout:g} s."
            raise ConfigError(
                f"task {self.task.name!r}: check {self._shown} finds the first record's own target wrong: {fault}",
                hint="it has to end with 0 for a right answer; a record's `target` has to be one.",
            )

    @property
    def _shown(self) -> str:
        return shlex.join(self.task.check).replace("\0", "\\0")

    def all(self, asked: Sequence[tuple[Mapping[str, Any], str]]) -> list[bool]:
        """Of each (record, answer), whether the command ends with 0."""
        jobs = [(self.task.check, self._told(*one)) for one in asked]
        with self._started():
            return [ended == 0 for ended in Commands().all(jobs, self.timeout)]

    def _told(self, record: Mapping[str, Any], answer: str) -> bytes:
        prompt = render(self.task, record)[0]
        try:
            told = json.dumps({"prompt": prompt, "answer": answer, "record": dict(record)}, default=str)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where_of(record)}: a check is told the record as JSON, which it cannot be written as: {error}.",
                hint="name its fields by text.",
            ) from error
        return told.encode()

    @contextmanager
    def _started(self) -> Iterator[None]:
        """ConfigError for a command that cannot be started."""
        try:
            yield
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                f"task {self.task.name!r}: check {self._shown} cannot be run: {why}.",
                hint="name a program and its arguments, as in check: [python, check.py].",
            ) from error


def _last_line(file: IO[bytes]) -> str:
    """Of the end of a file, however long it is."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 2000, 0))
    return (file.read().decode(errors="replace").strip().splitlines() or [""])[-1]

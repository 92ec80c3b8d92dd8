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
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from molora.config import RunConfig
from molora.config.evaluation import SamplingConfig
from molora.data.render import render
from molora.data.tasks import Task
from molora.errors import ConfigError


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
        fault = self._fault(record, render(self.task, record)[1])
        if fault is not None:
            raise ConfigError(
                f"task {self.task.name!r}: check {self._shown} finds the first record's own target wrong: {fault}",
                hint="it has to end with 0 for a right answer; a record's `target` has to be one.",
            )

    @property
    def _shown(self) -> str:
        return " ".join(self.task.check)

    def all(self, asked: Sequence[tuple[Mapping[str, Any], str]]) -> list[bool]:
        """Of each (record, answer), whether it passes; several are looked at at once."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [*pool.map(lambda one: self.passes(*one), asked)]

    def passes(self, record: Mapping[str, Any], answer: str) -> bool:
        """Whether the command ends with 0."""
        return self._fault(record, answer) is None

    def _fault(self, record: Mapping[str, Any], answer: str) -> str | None:
        """How the command ended, where that was not with 0."""
        prompt = render(self.task, record)[0]
        told = json.dumps({"prompt": prompt, "answer": answer, "record": dict(record)}, default=str)
        try:
            done = subprocess.run(
                [*self.task.check], input=told.encode(), timeout=self.timeout,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it took longer than {self.timeout:g} s."
        except OSError as error:
            raise ConfigError(
                f"task {self.task.name!r}: check {self._shown} cannot be run: {error.strerror}.",
                hint="name a program and its arguments, as in check: [python, check.py].",
            ) from error
        if done.returncode == 0:
            return None
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"it ended with {done.returncode}" + (f", saying {said[-1]!r}." if said else ".")

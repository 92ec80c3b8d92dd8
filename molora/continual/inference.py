"""load_router: a finished sequence's names for the tasks of prompts that come without an id."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.config.continual import PrototypesConfig
from molora.continual.memory import stored
from molora.continual.router import PrototypeRouter, features
from molora.data.prompts import prompt_within
from molora.disk.manifest import verify_folder
from molora.errors import ConfigError
from molora.models.task_router import named_prompts
from molora.store.adapter import read_config
from molora.store.runs import Run


@dataclass(frozen=True)
class TaskNamer:
    """Names tasks as the adapter of a sequence does by itself; see `load_router`."""

    tasks: list[str]  # in the order they were learned
    max_length: int
    task_type: str

    def __call__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 32
    ) -> list[str | None]:
        """The task of each prompt, to be given as `routing_task_ids`, or to `molora.routing(model, task_ids=...)`.

        `model` and `tokenizer` are the run's, as `molora.load` gives them. Prompts are texts as the model is given them,
        after the task's template; they are cut where training cuts them. None: no known task, where the router says so.
        """
        tokens = [prompt_within(tokenizer, text, self.max_length, self.task_type) for text in prompts]
        return self._names(model, tokenizer, tokens, batch_size)

    def _names(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch_size: int
    ) -> list[str | None]:
        return [row.task for row in named_prompts(model, tokenizer, prompts, batch_size=batch_size)]


@dataclass(frozen=True)
class PrototypeNamer(TaskNamer):
    """The same by prototypes in the run's memory, as earlier runs have them."""

    router: PrototypeRouter
    depth: float

    def _names(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch_size: int
    ) -> list[str | None]:
        return [*self.router.predict(features(model, tokenizer, prompts, batch_size, self.depth))]


def load_router(run: str | os.PathLike[str] | Run) -> TaskNamer:
    """Who names tasks in a finished sequence: its adapter's router, which `molora.route` asks as well.

    Raises ConfigError for anything but a finished sequence with a router, AdapterError for a damaged folder.
    """
    run = run if isinstance(run, Run) else Run.find(run)
    section, data = run.config.continual, run.config.data
    if section is not None and run.adapter.is_dir():  # it is published last
        if section.prototypes is not None:
            return _kept(run, section.prototypes)
        if read_config(run.adapter).router is not None:
            return TaskNamer(list(data.tasks), data.max_length, run.config.base.task_type)
    raise ConfigError(
        f"{run.path} is no finished sequence with a router.",
        hint="train with `molora continual` and `continual.router: gaussian`, which strategy color has anyway.",
    )


def _kept(run: Run, settings: PrototypesConfig) -> PrototypeNamer:
    config, memories = run.config, (run.path / "stages").glob("*/memory")
    last: Path = max(memories, key=lambda memory: int(memory.parent.name.split("-")[0]))
    verify_folder(last)
    router, tasks = PrototypeRouter(settings.clusters, settings.metric), list(config.data.tasks)
    router.restore(stored(last, "router"), tasks)
    return PrototypeNamer(tasks, config.data.max_length, config.base.task_type, router, settings.depth)

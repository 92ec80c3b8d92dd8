"""Using a finished sequence: the prototypes of a run name the task of prompts that come without an id."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.continual.memory import stored
from molora.continual.router import PrototypeRouter, features
from molora.data.prompts import prompt_within
from molora.disk.manifest import verify_folder
from molora.errors import ConfigError
from molora.store.runs import Run


@dataclass(frozen=True)
class TaskNamer:
    """Names tasks by the prototypes of a sequence run; see `load_router`."""

    router: PrototypeRouter
    depth: float
    max_length: int
    task_type: str

    @property
    def tasks(self) -> list[str]:
        """The tasks it knows, in the order they were learned."""
        return list(self.router.centres)

    def __call__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 32
    ) -> list[str]:
        """The task of each prompt, to be given as `routing_task_ids`, or to `molora.routing(model, task_ids=...)`.

        `model` and `tokenizer` are the run's, as `molora.load` gives them. Prompts are texts as the model is given them,
        after the task's template; they are cut where training cuts them.
        """
        tokens = [prompt_within(tokenizer, text, self.max_length, self.task_type) for text in prompts]
        return self.router.predict(features(model, tokenizer, tokens, batch_size, self.depth))


def load_router(run: str | os.PathLike[str] | Run) -> TaskNamer:
    """The prototypes that a sequence run ended with.

    Raises ConfigError for anything but a finished sequence with a router, AdapterError for a damaged folder.
    """
    run = run if isinstance(run, Run) else Run.find(run)
    section = run.config.continual
    memories = sorted((run.path / "stages").glob("*/memory"), key=lambda m: int(m.parent.name.split("-")[0]))
    unfinished = not run.adapter.is_dir()  # it is published last
    if section is None or section.router is None or not memories or unfinished:
        raise ConfigError(
            f"{run.path} is no finished sequence with prototypes to name tasks by.",
            hint="train with `molora continual` and `continual.router: prototypes`, which strategy color has anyway.",
        )
    verify_folder(memories[-1])
    router = PrototypeRouter(section.router.clusters, section.router.metric)
    router.restore(stored(memories[-1], "router"), list(run.config.data.tasks))
    return TaskNamer(router, section.router.depth, run.config.data.max_length, run.config.base.task_type)

"""The sequence runner: each task in turn is trained, then every task is scored, those still to come among them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig, load_recipe
from molora.config.continual import ContinualConfig
from molora.config.grow import NewExpert
from molora.config.load import Recipe
from molora.continual.registry import build_strategy
from molora.continual.strategy import Strategy, Turn
from molora.continual.tables import write_tables
from molora.continual.turn import drawn, turn_recipe
from molora.continual.turns import Known, TurnsRun, check_held_out, train_in_turns
from molora.data.clusters import need_kmeans
from molora.data.tasks import TaskSet
from molora.errors import ConfigError
from molora.store.runs import Run


def train_sequence(
    recipe: Recipe, overrides: Sequence[str] = (), resume: bool | str | os.PathLike[str] | None = None
) -> Run:
    """Train on a recipe's tasks one after another and measure what is forgotten.

    The run it returns has `matrix.json`, `matrix.csv` and `matrix.png`, `stages/NN-task` with a run folder each, and
    `adapter`, that of the last turn.

    Args:
        recipe: path of a YAML file with a `continual` section, the same as a mapping, or a RunConfig.
        overrides: `section.key=value` texts applied on top.
        resume: True continues the recipe's latest run, a path the run in that folder.

    Raises:
        ConfigError, DataError: before anything is written. DivergedError, InterruptedRun: as `molora.train`.
    """
    config = load_recipe(recipe, overrides)
    _settings(config)
    return train_in_turns(SequenceRun, config, resume)


def _settings(config: RunConfig) -> ContinualConfig:
    if config.continual is None:
        raise ConfigError(
            "the recipe has no `continual` section.",
            hint="add `continual: {strategy: ...}`, or use `molora train`.",
        )
    return config.continual


class SequenceRun(TurnsRun):
    """One task after another, or all at once (`joint`), by a registered strategy."""

    def __init__(self, config: RunConfig, tasks: TaskSet, run: Run) -> None:
        self.settings = _settings(config)
        self.joint, self.softmax = self.settings.strategy.spec.at_once, self.settings.softmax
        super().__init__(config, tasks, run)

    @classmethod
    def check(cls, config: RunConfig, tasks: TaskSet) -> None:
        """A mixture must stay valid as it grows, and there must be something to measure on."""
        settings = _settings(config)
        for turn in (0, len(config.data.tasks) - 1):
            turn_recipe(config, dict.fromkeys(config.data.tasks, 0), turn)
        if config.train.devices not in (1, [0]) or config.train.strategy != "auto":
            raise ConfigError("a sequence of tasks is trained on one device; set train.devices: 1.")
        if settings.prototypes is not None:
            need_kmeans("continual.router")
        check_held_out(config, tasks)

    @classmethod
    def recipe_of(cls, config: RunConfig, ids: Mapping[str, int], index: int) -> Known:
        """All tasks at once get as many steps as they get one by one."""
        joint = _settings(config).strategy.spec.at_once
        recipe, known = turn_recipe(config, ids, len(config.data.tasks) - 1 if joint else index)
        train = recipe.train
        if joint and train.max_steps is not None:
            train = train.model_copy(update={"max_steps": train.max_steps * len(config.data.tasks)})
        return recipe.model_copy(update={"train": train}), known

    @classmethod
    def tasks_of_turns(cls, config: RunConfig) -> list[list[str]]:
        """One each, or all at once."""
        names = list(config.data.tasks)
        return [names] if _settings(config).strategy.spec.at_once else [[name] for name in names]

    def make_strategy(self) -> Strategy:
        """The recipe's."""
        return build_strategy(self.settings.strategy)

    @property
    def names(self) -> list[str]:
        """Those of the tasks."""
        return ["all"] if self.joint else [task.name for task in self.tasks]

    def learned(self, index: int) -> tuple[int, int]:
        """One task each."""
        return len(self.tasks) - 1 if self.joint else index, 1

    def expert(self, index: int) -> NewExpert | None:
        """One for each task, unless one serves all."""
        return None if self.strategy.one_expert else NewExpert()

    def remember(self, tokenizer: PreTrainedTokenizerBase, turn: Turn, model: PeftModel) -> None:
        """Prototypes, as earlier runs have them."""
        if (kept := self.settings.prototypes) is not None:
            for task in self.tasks if self.joint else [turn.task]:
                examples = drawn(self.config, tokenizer, task, kept.records)
                self.memory.learn(model, tokenizer, task, examples, turn.seed)

    def write_tables(self, rows: Sequence[dict[str, Any]]) -> None:
        """The matrices."""
        write_tables(self.run.path, self.tasks, rows)

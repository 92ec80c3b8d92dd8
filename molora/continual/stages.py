"""The staged runner: each stage trains a new expert on its own tasks, over the frozen experts of earlier stages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from molora.config import RunConfig, load_recipe
from molora.config.grow import NewExpert
from molora.config.load import Recipe
from molora.config.objective import OBJECTIVES
from molora.config.stages import ExpertStage
from molora.continual.staged import Staged, stage_weights
from molora.continual.strategy import Strategy
from molora.continual.tables import write_stages
from molora.continual.turns import Known, TurnsRun, check_held_out, train_in_turns
from molora.data.tasks import TaskSet
from molora.errors import ConfigError
from molora.models.build import load_trained
from molora.store.runs import Run
from molora.training.evaluate import evaluate_run
from molora.training.optimise import check_device
from molora.training.trackers import check_loggers


def train_stages(
    recipe: Recipe, overrides: Sequence[str] = (), resume: bool | str | os.PathLike[str] | None = None
) -> Run:
    """Build a model in stages, each a new expert on its own tasks, and score the tasks after each.

    A stage's tasks have its expert and those of all earlier stages, which are frozen. So the tasks of earlier stages stay
    what they were, bit by bit, and preferences (`objective: dpo`) are measured from the model of the stage before. The run has
    `stages.json`, `stages.csv` and `stages.png`, `stages/NN-name` with a run folder each, and `adapter` and a report of the
    whole.

    Args:
        recipe: path of a YAML file with `stages`, the same as a mapping, or a RunConfig.
        overrides: `section.key=value` texts applied on top.
        resume: True continues the recipe's latest run, a path the run in that folder. Between stages or inside one, the
            result is that of an uninterrupted run.

    Raises:
        ConfigError, DataError: before anything is written. DivergedError, InterruptedRun: as `molora.train`.
    """
    config = load_recipe(recipe, overrides)
    _stages(config)
    return train_in_turns(StagedRun, config, resume)


def _stages(config: RunConfig) -> list[ExpertStage]:
    if config.stages is None:
        raise ConfigError("the recipe has no `stages`.", hint="add them, or use molora.train.")
    return config.stages


def stage_recipe(config: RunConfig, ids: Mapping[str, int], index: int) -> Known:
    """The recipe of one stage alone, of the experts and tasks up to it, and the ids of these tasks."""
    stages = _stages(config)[: index + 1]
    names = [task for stage in stages for task in stage.tasks]
    plain = config.model_dump(mode="json")
    adapter, weights = plain["adapter"], stage_weights(stages)
    adapter["expert_names"] = [stage.name for stage in stages]
    adapter["num_experts"] = len(stages)
    adapter["tasks"] = {task: weights[i] for i, stage in enumerate(stages) for task in stage.tasks}
    plain["stages"] = None
    plain["train"] = stages[-1].train.model_dump(mode="json")
    plain["data"]["tasks"] = {name: plain["data"]["tasks"][name] for name in names}
    return load_recipe(plain), {name: ids[name] for name in names}


class StagedRun(TurnsRun):
    """One stage after another."""

    @classmethod
    def check(cls, config: RunConfig, tasks: TaskSet) -> None:
        """What a later stage would stumble over after hours."""
        for index, stage in enumerate(_stages(config)):
            stage_recipe(config, dict.fromkeys(config.data.tasks, 0), index)
            check_device(stage.train)
            check_loggers(stage.train)
            OBJECTIVES[stage.train.objective.kind].check_tasks([tasks[name] for name in stage.tasks])
        check_held_out(config, tasks)

    @classmethod
    def recipe_of(cls, config: RunConfig, ids: Mapping[str, int], index: int) -> Known:
        """See `stage_recipe`."""
        return stage_recipe(config, ids, index)

    @classmethod
    def tasks_of_turns(cls, config: RunConfig) -> list[list[str]]:
        """Those of the stages."""
        return [stage.tasks for stage in _stages(config)]

    def make_strategy(self) -> Strategy:
        """What weighs the experts of a stage's tasks."""
        return Staged(_stages(self.config))

    @property
    def names(self) -> list[str]:
        """Those of the stages."""
        return [stage.name for stage in _stages(self.config)]

    def learned(self, index: int) -> tuple[int, int]:
        """The tasks of the stage."""
        counts = [len(stage.tasks) for stage in _stages(self.config)]
        return sum(counts[: index + 1]) - 1, counts[index]

    def expert(self, index: int) -> NewExpert | None:
        """One, of the stage's name."""
        stage = _stages(self.config)[index]
        return NewExpert(name=stage.name, init=stage.init, isolate=False)

    def write_tables(self, rows: Sequence[dict[str, Any]]) -> None:
        """The scores after each stage."""
        write_stages(self.run.path, self.names, self.tasks, rows)

    def finish(self) -> None:
        """The report of the whole, on every task."""
        if self.run.report is None:
            model, tokenizer, _ = load_trained(self.run.path)
            evaluate_run(self.run, model, tokenizer, self.all_tasks)

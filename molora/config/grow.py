"""GrowConfig: what `molora add-expert` trains the new expert on, and how; much that is left out comes from the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from molora.config.adapter import RouterSection
from molora.config.continual import STRATEGIES, StrategyConfig
from molora.config.data import KIND_KEYS, KIND_OF_TASK_TYPE, TaskConfig
from molora.config.load import Recipe, load_section, read_text
from molora.config.loss_rules import AuxLosses
from molora.config.run import RunConfig
from molora.config.section import ExpertName, Section, TaskName, refuse
from molora.config.stages import inherited
from molora.config.strict_yaml import parse
from molora.config.suggest import options
from molora.config.train import TrainConfig
from molora.errors import ConfigError


class NewTask(TaskConfig):
    """The new task: like a task in `data.tasks`, with its name inside."""

    name: TaskName
    """The new task's name."""

    def as_task(self) -> TaskConfig:
        """The same as an entry of `data.tasks`."""
        return TaskConfig.model_validate(self.model_dump(exclude={"name"}))


STARTS = ("new", "mean", "nearest")


class NewExpert(Section):
    """The new expert: its name, its start, and whether older tasks see it."""

    name: ExpertName | None = None
    """The new expert's name; null: the task's."""
    init: str = "new"
    """`new`, `mean` of the old ones, `copy:<expert>`, or `nearest`: a copy of the expert of that task which the router takes most
    of the new prompts for."""
    isolate: bool | None = None
    """Hide it from older tasks; null: where a router tells their prompts apart, so that the gate works for them as before."""

    @field_validator("init")
    @classmethod
    def _check_init(cls, value: str) -> str:
        if value not in STARTS and not (value.startswith("copy:") and value != "copy:"):
            refuse([((), f"{value!r} is not a start.{options(value, (*STARTS, 'copy:<expert>'))}")])
        return value


class GrowConfig(Section):
    """A recipe that adds one expert to a trained run."""

    task: NewTask
    """The new task, as in `data.tasks`."""
    expert: NewExpert = Field(default_factory=NewExpert)
    """The new expert."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How it is trained; what is left out is as in the run."""
    aux_losses: AuxLosses = Field(default_factory=dict)
    """Auxiliary losses; those of the run where left out."""
    strategy: StrategyConfig = Field(default_factory=lambda: StrategyConfig(kind="inc_lora"))
    """How old tasks are kept; one that needs only their experts."""
    router: RouterSection | None = Field(default_factory=RouterSection)
    """Who names tasks of prompts without an id from then on, where the run's adapter has nobody yet; null: nobody."""
    softmax: Literal["own", "seen"] = "own"
    """Whose labels compete while a classifier with `head: match` trains: the new task's, or all."""

    @field_validator("task")
    @classmethod
    def _check_task(cls, value: NewTask) -> NewTask:
        if value.weight != 1:
            refuse([(("weight",), "does nothing: an expert is added on one task alone.")])
        return value

    @model_validator(mode="after")
    def _check_growth(self) -> Self:
        if self.train.rank_growth is not None and self.strategy.kind != "inc_lora":
            text = f"strategy {self.strategy.kind} compares factors of one size; use inc_lora."
            refuse([(("train", "rank_growth"), text)])
        return self

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, value: StrategyConfig) -> StrategyConfig:
        if not value.spec.without_memory:
            allowed = ", ".join(name for name, spec in STRATEGIES.items() if spec.without_memory)
            text = f"{value.kind} needs what a sequence keeps of earlier tasks (molora continual). Allowed: {allowed}."
            refuse([(("kind",), text)])
        return value


def is_grow(source: str | os.PathLike[str]) -> bool:
    """Whether a recipe file adds an expert to a run (it has `task`) rather than starting one (it has `data`)."""
    path = Path(source)
    data = parse(read_text(path), str(path)).data
    return isinstance(data, dict) and "task" in data and "data" not in data


def load_grow(source: Recipe, overrides: Sequence[str] = (), *, run: RunConfig | None = None) -> GrowConfig:
    """Read and check a recipe for a new expert; `train`, `aux_losses` and the task's kind default to what fits `run`.

    Raises:
        ConfigError: everything wrong with it, as `load_recipe` does.
    """
    _refuse_recipe(source)
    if run is None:
        return load_section(GrowConfig, source, overrides, _kind_by_keys)
    inherited = run.model_dump(mode="json")
    return load_section(GrowConfig, source, overrides, lambda data: _inherit(data, inherited))


def _refuse_recipe(source: Recipe) -> None:
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file() and not is_grow(source):
        data = parse(read_text(Path(source)), str(source)).data
        if isinstance(data, dict) and "data" in data and "task" not in data:
            raise ConfigError(
                f"{source} starts a run; it adds no expert to one.",
                hint=f"molora train {source}; a recipe for add-expert has a `task` (molora recipes show add_expert).",
            )


def _kind_by_keys(data: dict[str, Any]) -> dict[str, Any]:
    """The kind of a task that leaves it to the run, by the settings that only a classification has."""
    task = data.get("task")
    if isinstance(task, dict) and "kind" not in task and {*task} & {*KIND_KEYS["classification"]}:
        return {**data, "task": {**task, "kind": "classification"}}
    return data


def _inherit(data: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    own, task = data.get("train", {}), data.get("task")
    whole = {"aux_losses": run["adapter"]["aux_losses"]} | data
    if isinstance(task, dict):
        whole["task"] = {"kind": KIND_OF_TASK_TYPE[run["base"]["task_type"]]} | task
    if isinstance(own, dict):
        kept = {k: v for k, v in run["train"].items() if k not in ("objective", "rank_growth")}
        whole["train"] = inherited(kept, own)
    return whole

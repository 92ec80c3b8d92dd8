"""The `stages` section: a model built expert by expert, each stage with its own data, objective and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from molora.config.continual import BY_TASK
from molora.config.section import ExpertName, Problem, Section, TaskName
from molora.config.suggest import options
from molora.config.train import TrainConfig

Whole = Any  # a RunConfig, whose module imports this one


class ExpertStage(Section):
    """A new expert, trained while those of earlier stages are frozen and active."""

    name: ExpertName
    """The stage's name, and its expert's."""
    tasks: list[TaskName] = Field(default_factory=list)
    """The tasks of `data.tasks` that it trains on; the one of its own name where left out."""
    init: str = "new"
    """The expert's start: `new`, `mean` of the older ones, or `copy:<stage>`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What older stages' weights fall to, evenly over its steps; they stay there for its tasks. 1: they stay as they are."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How it is trained; what is left out is as in the recipe's `train`."""


def filled_stages(data: Any) -> Any:
    """A recipe as written with everything that follows from its stages: their tasks, training, gate and tasks' order."""
    if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
        return data
    shared = data.get("train") or {}
    data = {**data, "stages": [_filled(stage, shared) for stage in data["stages"]]}
    adapter = data.get("adapter") or {}
    if isinstance(adapter, dict) and "preset" not in adapter and not adapter.get("from_loras"):
        experts = adapter.get("num_experts") or 1
        data["adapter"] = {"gate": BY_TASK, **adapter, "num_experts": experts}
    try:
        order, tasks = [task for stage in data["stages"] for task in stage["tasks"]], data["data"]["tasks"]
        if sorted(order) == sorted(tasks):  # ids are given in the order in which tasks are learned
            data["data"] = data["data"] | {"tasks": {name: tasks[name] for name in order}}
    except (KeyError, TypeError):  # absent or of a wrong type: the fields' own checks report it
        pass
    return data


def _filled(stage: Any, shared: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    own = stage.get("train") or {}
    if "name" in stage:
        stage = {"tasks": [stage["name"]], **stage}
    try:
        whole = TrainConfig.model_validate(shared)
    except ValidationError:  # said once, of `train`
        return {key: value for key, value in stage.items() if key != "train"}
    return (
        stage
        if not isinstance(own, dict)
        else {**stage, "train": inherited(whole.model_dump(mode="json"), own)}
    )


def inherited(train: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training as written over those of another one; the length comes from one of the two."""
    length = own.get("max_steps") is not None or own.get("epochs") is not None
    no_length = {"max_steps": None, "epochs": None} if length else {}
    return {**train, **no_length, **own}


def one_by_one_problems(run: Whole) -> Iterator[Problem]:
    """What no recipe may have that learns tasks one after another."""
    if run.features is not None:
        yield ("features",), "does not go with tasks one after another."
    if run.base.task_type == "SEQ_CLS" and run.base.head != "match":
        text = "a head that is trained task by task forgets; use `match`, the nearest label text."
        yield ("base", "head"), text
    for name, task in run.data.tasks.items():
        if task.metric == "loss":
            yield ("data", "tasks", name, "metric"), "must be a share of right answers, not a loss."


def stage_problems(run: Whole, stages: Sequence[ExpertStage]) -> Iterator[Problem]:
    """Everything that contradicts a recipe's stages."""
    for name in ("continual", "federated"):
        if getattr(run, name) is not None:
            yield ("stages",), f"does not go with `{name}`: both say what is learned when; write only one."
            return
    adapter = run.adapter
    if adapter.from_loras is not None:
        text = "does not go with stages, whose experts are new; leave it out, or fuse them afterwards."
        yield ("adapter", "from_loras"), text
        return
    if adapter.num_experts != 1:
        yield ("adapter", "num_experts"), "each stage adds one; leave it out."
    for key in ("expert_names", "tasks", "frozen_experts"):
        if getattr(adapter, key) not in (None, []):
            yield ("adapter", key), "is the stages' to say; leave it out."
    if adapter.gate.scope != "task" or adapter.gate.score != "none":
        text = "a stage's tasks have its expert and all older ones, by task id; leave the gate out. "
        yield (
            ("adapter", "gate"),
            text + "One over finished stages is trained afterwards: adapter.from_loras.",
        )
    yield from one_by_one_problems(run)
    yield from _name_problems(run, stages)
    for i, stage in enumerate(stages):
        yield from ((("stages", i, *path), text) for path, text in _alone(stage, stages[:i]))


def _name_problems(run: Whole, stages: Sequence[ExpertStage]) -> Iterator[Problem]:
    known = list(run.data.tasks)
    names: set[str] = set()
    taken: dict[str, str] = {}
    for i, stage in enumerate(stages):
        if stage.name.casefold() in names:
            yield ("stages", i, "name"), f"{stage.name!r} is there twice (upper and lower case count as one)."
        names.add(stage.name.casefold())
        for task in stage.tasks:
            if task not in known:
                yield ("stages", i, "tasks"), f"{task!r} is no task of data.tasks.{options(task, known)}"
            elif task in taken:
                yield ("stages", i, "tasks"), f"{task!r} is learned in stage {taken[task]!r} already."
            taken.setdefault(task, stage.name)
    left = [task for task in known if task not in taken]
    if left:
        yield (
            ("stages",),
            f"no stage trains on {', '.join(left)}; give it to one, or leave it out of data.tasks.",
        )


def _alone(stage: ExpertStage, older: Sequence[ExpertStage]) -> Iterator[Problem]:
    starts = ["new", *(["mean", *(f"copy:{one.name}" for one in older)] if older else [])]
    if stage.init not in starts:
        yield ("init",), f"{stage.init!r} is not a start.{options(stage.init, starts)}"
    if not stage.tasks:
        yield ("tasks",), "names no task."
    if stage.gamma != 1 and not older:
        yield ("gamma",), "is about older stages, and the first has none."
    if stage.gamma != 1 and stage.train.patience is not None:
        yield (
            ("gamma",),
            "is reached with the last step, before which train.patience may end; write only one.",
        )
    if stage.train.rank_growth is not None:
        yield ("train", "rank_growth"), "is of one training alone; an expert of a stage keeps its ranks."
    if stage.train.devices not in (1, [0]) or stage.train.strategy != "auto":
        yield ("train", "devices"), "a stage is trained on one device; set train.devices: 1."

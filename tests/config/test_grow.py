"""The recipe of a new expert: what it must say, and what it takes from the run."""

from __future__ import annotations

from typing import Any

import pytest

from molora.config import RunConfig, load_grow, load_recipe
from molora.errors import ConfigError
from tests.config.recipes import small

TASK = {"name": "new", "source": "synthetic", "generator": "reverse"}


@pytest.fixture
def run() -> RunConfig:
    adapter = {"num_experts": 4, "aux_losses": {"balance": 0.5}}
    return load_recipe(small(adapter=adapter, train={"max_steps": 10, "lr": 0.25, "batch_size": 3}))


def test_what_is_left_out_comes_from_the_run(run: RunConfig) -> None:
    config = load_grow({"task": TASK}, run=run)
    assert config.train == run.train
    assert config.aux_losses == {"balance": 0.5}
    assert (config.expert.name, config.expert.init, config.expert.isolate) == (None, "new", None)
    assert config.router is not None and config.router.kind == "gaussian"
    assert load_grow({"task": TASK, "router": None}, run=run).router is None


def test_what_is_given_wins(run: RunConfig) -> None:
    config = load_grow({"task": TASK, "train": {"lr": 0.5}, "aux_losses": {}}, run=run)
    assert (config.train.lr, config.train.batch_size, config.train.max_steps) == (0.5, 3, 10)
    assert config.aux_losses == {}


@pytest.mark.parametrize(("length", "expected"), [({"epochs": 2}, (None, 2)), ({"max_steps": 7}, (7, None))])
def test_the_length_is_one_setting(run: RunConfig, length: dict[str, int], expected: Any) -> None:
    config = load_grow({"task": TASK, "train": length}, run=run)
    assert (config.train.max_steps, config.train.epochs) == expected


def test_overrides_reach_it(run: RunConfig) -> None:
    config = load_grow({"task": TASK}, ["task.train_size=5", "train.epochs=2"], run=run)
    assert (config.task.train_size, config.train.epochs, config.train.max_steps) == (5, 2, None)


def test_the_task_becomes_one_of_the_run(run: RunConfig) -> None:
    task = load_grow({"task": TASK}, run=run).task.as_task()
    tasks = {**run.data.tasks, "new": task}
    assert (
        load_recipe(run.model_copy(update={"data": run.data.model_copy(update={"tasks": tasks})})).data.tasks
        == tasks
    )


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({}, "task: is missing, and has no default."),
        ({"task": {**TASK, "name": "../x"}}, "task.name: task name '../x'"),
        ({"task": {k: v for k, v in TASK.items() if k != "name"}}, "task.name: is missing"),
        ({"task": TASK, "expert": {"init": "old"}}, "'old' is not a start. Allowed: new, mean, nearest, copy:<expert>."),
        ({"task": TASK, "expert": {"init": "copy:"}}, "expert.init: 'copy:' is not a start."),
        ({"task": TASK, "expert": {"nmae": "x"}}, "expert.nmae: not a setting. Did you mean 'name'?"),
        ({"task": TASK, "aux_losses": {"ortogonal": 1}}, "aux_losses.ortogonal: not an auxiliary loss. Did you mean"),
        ({"task": TASK, "aux_losses": {"orthogonal": {"norm": "l2", "coefficient": 1}}}, "'l2' is not one of l1, squared."),
        ({"task": TASK, "aux_losses": {"orthogonal": {"norm": "l1"}}}, "needs a coefficient"),
        ({"task": TASK, "train": "fast"}, "train: must be a section"),
        ({"task": TASK, "adapter": {}}, "adapter: not a setting."),
    ],
)  # fmt: skip
def test_refusals(run: RunConfig, recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_grow(recipe, run=run)
    assert words in str(caught.value)

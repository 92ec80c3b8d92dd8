"""`train.rank_growth`: when experts grow, that a run which never does is any run, and that a killed one ends the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config.load import load_recipe
from molora.continual.grow import add_expert
from molora.errors import ConfigError
from molora.models.build import load_trained
from molora.training import module
from molora.training.forecast import at_largest
from molora.training.train import train
from tests.config.recipes import small
from tests.training.runs import adapter_weights, assert_same_weights, recipe_for

GROWTH = {"every": 2, "by": 2, "max": 5}


def recipe(base: Path, output: Path, **settings: Any) -> dict[str, Any]:
    steps = {"max_steps": 7, "save_every": 1, "keep_checkpoints": 9, "weight_decay": 0.1}
    made = recipe_for(base, output, **{**steps, "rank_growth": GROWTH, **settings})
    made["adapter"]["plain_targets"] = ["down_proj"]
    return made


def ranks(folder: Path) -> set[int]:
    return {t.shape[1] for name, t in adapter_weights(folder).items() if name.endswith(".A") and len(t) > 1}


def test_a_run_grows_goes_on_where_it_was_killed_and_its_checkpoints_load(base: Path, tmp_path: Path) -> None:
    full = train(recipe(base, tmp_path / "full"))
    found = [ranks(path) for path in full.checkpoints]
    assert found == [{2}, {2}, {4}, {4}, {5}, {5}, {5}] and ranks(full.adapter) == {5}

    def crash(*_: Any) -> None:
        raise KeyError("a crash")

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # between the first growth and the second, and right before the second
        for step in (4, 5):
            resume = step == 5
            original = module.MoLoraModule.on_train_batch_start

            def stop(self: Any, batch: Any, index: int, at: int = step, then: Any = original) -> None:
                if self.global_step == at - 1:
                    crash()
                then(self, batch, index)

            patch.setattr(module.MoLoraModule, "on_train_batch_start", stop)
            with pytest.raises(KeyError):
                train(recipe(base, tmp_path / "killed"), resume=resume)
            patch.setattr(module.MoLoraModule, "on_train_batch_start", original)
    assert_same_weights(full.adapter, train(recipe(base, tmp_path / "killed"), resume=True).adapter)
    for step, rank in ((2, 2), (3, 4), (7, 5)):
        model = load_trained(full.path, checkpoint=step)[0]
        assert {m.A.shape[1] for name, m in model.named_modules() if name.endswith("experts.default")} >= {
            rank
        }


def test_an_expert_that_is_added_grows_and_the_others_stay(base: Path, tmp_path: Path) -> None:
    made = recipe_for(base, tmp_path, max_steps=2)
    made["adapter"] = {"num_experts": 2, "r": 2, "gate": "task"}
    made["eval"]["modes"] = ["task"]
    before = train(made)
    task = {"name": "third", "source": "synthetic", "generator": "pig", "train_size": 20, "eval_size": 4}
    growth = {"every": 1, "by": 2, "max": 5}
    run = add_expert(before, {"task": task, "train": {"max_steps": 3, "rank_growth": growth}})
    old, new = adapter_weights(before.adapter), adapter_weights(run.adapter)
    names = [name for name in old if name.endswith(".A")]
    assert names and all(new[name].shape[1] == 5 for name in names)
    for name in names:
        assert torch.equal(new[name][:2, :2], old[name]) and not new[name][:2, 2:].any()
    with pytest.raises(
        ConfigError, match=r"train\.rank_growth: strategy o_lora compares factors of one size"
    ):
        add_expert(before, {"task": task, "train": {"rank_growth": growth}, "strategy": "o_lora"})


def test_a_growth_that_never_comes_changes_nothing(base: Path, tmp_path: Path) -> None:
    never = {"every": 7, "by": 2, "max": 5}
    one = train(recipe(base, tmp_path / "one", rank_growth=never))
    two = train(recipe(base, tmp_path / "two", rank_growth=None))
    assert_same_weights(one.adapter, two.adapter)


@pytest.mark.parametrize(
    ("adapter", "rest", "message"),
    [
        ({"r": 8}, {"max": 8}, r"train.rank_growth.max: is 8, and adapter.r is 8 already"),
        ({"r": [4, 8]}, {"max": 16}, r"train.rank_growth: starts from one rank"),
        ({"kind": "adalora"}, {"max": 16}, r"train.rank_growth: goes with experts .* of kind lora, lora_fa, dora"),
        ({"share_A": True}, {"max": 16}, r"train.rank_growth: goes with experts that have an A of their own"),
        ({}, {"max": 16, "evry": 2}, r"every"),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_refused_before_anything_is_loaded(
    adapter: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    growth = {"every": 2, **rest} if "evry" not in rest else rest
    with pytest.raises(ConfigError, match=message):
        load_recipe(small(adapter=adapter, train={"max_steps": 4, "rank_growth": growth}))


def test_memory_and_parameters_are_told_of_for_the_ranks_that_experts_end_with() -> None:
    config = load_recipe("recipes/rank_growth.yaml")
    largest = at_largest(config)
    assert (config.adapter.r, config.train.rank_growth.max, largest.adapter.r) == (2, 8, 8)
    assert replace(largest.adapter, r=2) == config.adapter  # nothing else changed

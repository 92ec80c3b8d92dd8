"""What a search tries: from a file, or from the recipe; only what makes a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from molora.config.load import load_recipe
from molora.config.search_space import Range, default_space, own_values, read_space, with_values
from molora.errors import ConfigError
from tests.config.recipes import RECIPES, small


def test_a_recipe_is_smaller_larger_and_other_than_itself_and_each_choice_is_valid() -> None:
    config = load_recipe(RECIPES / "quickstart.yaml")
    space = default_space(config)
    assert space["adapter.r"] == [8, 2, 4, 16] and space["train.lr"] == Range(0.00125, 0.02, log=True)
    assert space["adapter.num_experts"] == [4, 8]  # two would not do for four tasks that have one each
    for key, choices in space.items():
        values = choices if isinstance(choices, list) else [choices.low, choices.high]
        made = [with_values(config, {key: value}) for value in values]
        assert len({one.model_dump_json() for one in made}) == len(values)
        if isinstance(choices, list):
            assert made[0] == config


def test_gates_by_task_and_ranks_by_layer_are_left_as_they_are() -> None:
    given = small(adapter={"r": [4, 8], "num_experts": 1, "gate": "task"})
    assert set(default_space(load_recipe(given))) == {"train.lr"}


def test_a_file_says_what_is_tried(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("adapter.r: [2, 4]\ntrain.lr: {low: 1.0e-3, high: 1.0e-2, log: true}\n")
    assert read_space(file) == {"adapter.r": [2, 4], "train.lr": Range(0.001, 0.01, True)}
    for text in (
        "adapter.r: []",
        "adapter.r: 4",
        "train.lr: {low: 1, high: 1}",
        "train.lr: {low: 0.0, high: 1.0, log: true}",
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match="allowed: a list of choices, or"):
            read_space(file)
    file.write_text("- adapter.r")
    with pytest.raises(ConfigError, match="must be a map"):
        read_space(file)


def test_keys_are_those_of_the_recipe() -> None:
    config = load_recipe(small())
    assert own_values(with_values(config, {"adapter.r": 4}), {"adapter.r": []}) == {"adapter.r": 4}
    for key in ("adapter.rank", "adaptr.r", "seed.r"):
        with pytest.raises(ConfigError, match=f"the search names '{key}', which the recipe does not have"):
            with_values(config, {key: 4})

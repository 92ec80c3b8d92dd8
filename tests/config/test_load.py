"""load_recipe and dump_recipe: every problem at once, with file, line, what is allowed and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molora.config import RunConfig, dump_recipe, load_grow, load_recipe
from molora.errors import ConfigError
from tests.config.recipes import RECIPES, SMALL, refusal, small

TRAINING_RECIPES = sorted(
    path for path in RECIPES.rglob("*.yaml") if path.stem not in ("add_expert", "preferences")
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def edited(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    return recipe


def test_a_path_and_a_mapping_mean_the_same(recipe: Path) -> None:
    assert load_recipe(recipe) == load_recipe(str(recipe)) == load_recipe(small())


def test_a_config_is_returned_equal() -> None:
    config = load_recipe(small())
    assert load_recipe(config) == config
    assert load_recipe(config, ["seed=5"]).seed == 5


def test_a_typo_names_line_path_and_nearest_name(recipe: Path) -> None:
    text = refusal(edited(recipe, "num_experts", "num_expert"))
    assert text.startswith(f"{recipe}:4  adapter.num_expert: not a setting. Did you mean 'num_experts'?")
    assert "Settings here: num_experts, r, lora_alpha" in text


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("train:", "trian:", 9, "trian: not a setting. Did you mean 'train'?"),
        ("top_k: 2", "topk: 2", 5, "adapter.gate.topk: not a setting of gate kind 'top_k'. Did you mean 'top_k'?"),
        ("kind: top_k", "kind: topk", 5, "adapter.gate.kind: 'topk' is not a kind of gate. Did you mean 'top_k'?"),
        ("generator: copy", "generater: copy", 8, "data.tasks.copy.generater: not a setting. Did you mean 'generator'?"),
        ("source: synthetic", "source: synthetics", 8, "data.tasks.copy.source: 'synthetics' is not allowed. Did you"),
        ("max_steps: 10", "max_steps: ten", 10, "train.max_steps: must be a whole number, not 'ten'."),
        ("max_steps: 10", "max_steps: 10.0", 10, "train.max_steps: must be a whole number, not 10.0."),
        ("max_steps: 10", "max_steps: 0", 10, "train.max_steps: must be at least 1, not 0."),
        ("max_steps: 10", "max_steps: 012", 10, "train.max_steps: must be a whole number, not '012'."),
        ("name: small", "name: 7", 1, "name: must be text, not 7; put it in quotes."),
        ("name: small", "name: a/b", 1, "name: run name 'a/b' contains '/'"),
        ("num_experts: 4", "num_experts: true", 4, "adapter.num_experts: must be a whole number or a list"),
        ("num_experts: 4", "num_experts: many", 4, "adapter.num_experts: must be a whole number or"),
        ("num_experts: 4", "lora_alpha: .nan", 4, "adapter.lora_alpha: must be"),
        ("num_experts: 4", "use_rslora: yes", 4, "adapter.use_rslora: must be true or false, not 'yes'."),
        ("num_experts: 4", "aux_losses: {balence: 1}", 4, "aux_losses.balence: not an auxiliary loss. Did you mean"),
        ("num_experts: 4", "aux_losses: {z: -1}", 4, "adapter.aux_losses.z: the coefficient must be a number"),
        ("num_experts: 4", "aux_losses: {z: {norm: l1}}", 4, "adapter.aux_losses.z.norm: not a setting."),
        ("base: molora/tiny", "base: {modle: x}", 2, "base.modle: not a setting. Did you mean 'model'?"),
    ],
)  # fmt: skip
def test_one_problem(recipe: Path, old: str, new: str, line: int, words: str) -> None:
    text = refusal(edited(recipe, old, new))
    assert f"{recipe}:{line}  " in text
    assert words in text


def test_every_problem_at_once_in_file_order(recipe: Path) -> None:
    edited(recipe, "name: small", "name: 'a/b'\nsede: 1")
    edited(recipe, "{kind: top_k, top_k: 2}", "{kind: top_k, top_k: 9}")
    edited(recipe, "max_steps: 10", "max_steps: 10\n  epochs: 2\n  precision: 16-true\n  lr: -1")
    lines = refusal(recipe).splitlines()
    assert lines[0] == f"{recipe}: 6 problems"
    starts = [line.strip().removeprefix(f"{recipe}:") for line in lines if f"{recipe}:" in line[2:]]
    assert [start.split(": ")[0] for start in starts] == [
        "1  name",
        "2  sede",
        "6  adapter.gate.top_k",
        "12  train.epochs",
        "13  train.precision",
        "14  train.lr",
    ]


def test_missing_sections_are_named() -> None:
    text = refusal({"name": "small"})
    for section in ("base", "data", "train"):
        assert f"{section}: is missing, and has no default." in text


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n", "# only a comment\n"])
def test_what_is_not_a_mapping_is_not_a_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content, encoding="utf-8")
    assert "is not a recipe: it must be a mapping" in refusal(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such recipe file" in refusal(tmp_path / "absent.yaml")
    assert "is a folder" in refusal(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: a\nbase: caf\xe9\n")
    assert f"{latin}:2  is not UTF-8 text." in refusal(latin)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * 1_000_001)
    assert "larger than 1,000,000 bytes" in refusal(large)


def test_a_byte_order_mark_is_no_problem(recipe: Path) -> None:
    recipe.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(recipe).name == "small"


@pytest.mark.parametrize("task", ["no", "012", "1e3", "true", "7", "null"])
def test_task_names_stay_text(recipe: Path, task: str) -> None:
    assert list(load_recipe(edited(recipe, "copy: {", f"{task}: {{")).data.tasks) == [task]


def test_a_mapping_with_keys_that_are_not_text_is_refused() -> None:
    text = refusal(small(data={"tasks": {7: {"source": "synthetic", "generator": "copy"}}}))
    assert "data.tasks" in text
    assert "must be text" in text


@pytest.mark.parametrize("path", TRAINING_RECIPES, ids=lambda path: path.stem)
def test_a_dumped_recipe_is_read_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path)
    dump_recipe(config, tmp_path / "config.yaml")
    again = load_recipe(tmp_path / "config.yaml")
    assert again == config
    assert again.model_dump(mode="json") == config.model_dump(mode="json")


def test_a_dumped_growth_recipe_is_read_back_equal(tmp_path: Path) -> None:
    config = load_grow(RECIPES / "add_expert.yaml")
    dump_recipe(config, tmp_path / "grow.yaml")
    assert load_grow(tmp_path / "grow.yaml") == config


def test_every_setting_survives_the_round_trip(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {
        "no": {"source": "jsonl", "train": ["a b.jsonl", "ü.jsonl"], "prompt": "Q: {q}\n# no comment\nA: ", "target": "{a}"},
        "1e3": {"source": "hub", "dataset": "a/b", "kind": "classification", "labels": ["no", "yes", "0"]},
    }  # fmt: skip
    config = load_recipe(
        small(
            adapter={"num_experts": 2, "r": {"q_proj": 4, ".": 8}, "tasks": {"no": ["expert_0"], "1e3": {"expert_1": 0.1}}},
            data={"tasks": tasks},
            train={"epochs": 3, "lr": 1e-7, "warmup": 3, "stages": [{"steps": 5, "train": ["experts"]}, {"train": ["gates"]}]},
        )
    )  # fmt: skip
    dump_recipe(config, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == config


def test_a_config_does_not_change() -> None:
    config = load_recipe(small())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_nothing_is_written_on_refusal(recipe: Path) -> None:
    before = sorted(recipe.parent.iterdir())
    with pytest.raises(ConfigError):
        load_recipe(edited(recipe, "num_experts", "num_expert"))
    assert sorted(recipe.parent.iterdir()) == before


def test_the_source_mapping_is_left_alone() -> None:
    source = small()
    load_recipe(source, ["adapter.gate.top_k=1", "data.tasks.copy.train_size=3"])
    assert source == small()
    assert isinstance(load_recipe(source), RunConfig)


def test_a_task_name_like_a_time_is_judged_as_text(recipe: Path) -> None:
    assert "task name '12:30' contains ':'" in refusal(edited(recipe, "copy: {", "12:30: {"))

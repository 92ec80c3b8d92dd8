"""Bad input: an error of one screen that says what to do, an exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from molora.training.train import train
from tests.cli.conftest import Cli, Result
from tests.training.runs import recipe_for, write_base

SCREEN = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, another base of the same shape, and a run trained on the first."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    write_base(folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    changed = {name: weight.flip(0).contiguous() for name, weight in weights.items()}
    save_file(changed, folder / "other" / "model.safetensors", {"format": "pt"})
    train(recipe_for(folder / "base", folder / "runs", max_steps=1))
    return folder


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe_for(place / "base", tmp_path / "runs")), encoding="utf-8")
    return path


def disturb(file: Path) -> None:
    """Flip one bit in the middle of the last quarter of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) - len(data) // 8] ^= 0b100
    file.write_bytes(data)


def check(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert len(result.err.splitlines()) <= SCREEN
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


TRAINING: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "typo": (["train.max_stpes=3"], ("train.max_stpes: not a setting. Did you mean 'max_steps'?",)),
    "too many experts per token": (["adapter.gate.top_k=9"], ("9 is more than num_experts = 3.",)),
    "target that matches nothing": (["adapter.target_modules=[q_porj]"], ("q_porj", "q_proj")),
    "unknown generator": (["data.tasks.copy.generator=cpoy"], ("cpoy", "copy")),
    "no such base": (["base=./absent"], ("base.model: cannot load './absent'",)),
    "half precision weights": (["train.precision=16-true"], ("Allowed: 32-true, bf16-mixed, 16-mixed.",)),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training(case: str, cli: Cli, recipe: Path) -> None:
    overrides, words = TRAINING[case]
    check(cli("train", recipe, *overrides), 2, *words)
    assert list(recipe.parent.iterdir()) == [recipe]


def test_a_truncated_record(cli: Cli, recipe: Path) -> None:
    data = recipe.parent / "law.jsonl"
    data.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a", "tar', encoding="utf-8")
    check(cli("train", recipe, f"data.tasks.law={{source: jsonl, train: {data}}}"), 3, f"{data}:2")
    assert sorted(recipe.parent.iterdir()) == [data, recipe]


def copied(place: Path, tmp_path: Path) -> Path:
    """A copy of the run, and of nothing else."""
    shutil.copytree(place / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "small"


def files(folder: Path) -> dict[Path, Any]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_an_unknown_task_at_eval(cli: Cli, place: Path, tmp_path: Path) -> None:
    run = copied(place, tmp_path)
    before = files(tmp_path)
    check(cli("eval", run, "--task", "revers"), 2, "revers", "Did you mean 'reverse'?")
    assert files(tmp_path) == before


def test_an_adapter_on_another_base_of_the_same_shape(cli: Cli, place: Path, tmp_path: Path) -> None:
    run = copied(place, tmp_path)
    config = run / "latest" / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "base"), str(place / "other")), encoding="utf-8")
    before = files(tmp_path)
    for verb in ("eval", "inspect"):
        check(cli(verb, run), 4, "base")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_in_the_adapter(name: str, cli: Cli, place: Path, tmp_path: Path) -> None:
    run = copied(place, tmp_path)
    disturb(run / "latest" / "adapter" / name)
    before = files(tmp_path)
    for verb in ("eval", "inspect"):
        check(cli(verb, run), 4, name)
    assert files(tmp_path) == before


def test_a_folder_that_is_no_run(cli: Cli, tmp_path: Path) -> None:
    for verb in ("eval", "inspect"):
        check(cli(verb, tmp_path), 2, str(tmp_path))
    assert list(tmp_path.iterdir()) == []

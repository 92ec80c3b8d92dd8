"""What the verbs show under a real terminal of 80 columns, and in a pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.terminal import COLOUR, COUNTED, ROOT, Shown, in_terminal
from tests.training.runs import recipe_for, write_base, write_encoder

MOLORA = [sys.executable, "-m", "molora.cli.main"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base."""
    folder = tmp_path_factory.mktemp("terminal")
    write_base(folder / "base")
    return folder


def written(place: Path, name: str, **changes: Any) -> Path:
    """A recipe file; `changes` are of its train section, or whole sections."""
    sections = {key: changes.pop(key) for key in ("continual", "adapter", "eval") if key in changes}
    recipe = recipe_for(place / "base", place / "runs", **changes) | {"name": name} | sections
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def assert_fits(shown: Shown, *names: str) -> None:
    for name in names:
        bars = shown.bars(name)
        assert bars and all(COUNTED.search(bar) and len(bar) <= 80 for bar in bars), (name, bars)


def test_errors_are_coloured_on_a_terminal_only() -> None:
    command = [*MOLORA, "validate", "nowhere.yaml"]
    shown = in_terminal(command)
    assert shown.code == 2
    assert "\x1b[1;31mConfigError\x1b[0m: nowhere.yaml: no such recipe file." in shown.output
    assert not COLOUR.search(in_terminal(command, environment={"NO_COLOR": "1"}).output)
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert piped.stderr.startswith("ConfigError: nowhere.yaml: no such recipe file.\n  hint: ")


@pytest.mark.slow
def test_training_and_its_evaluation(place: Path) -> None:
    shown = in_terminal([*MOLORA, "train", str(written(place, "shown", val_every=4))], cwd=place)
    assert shown.code == 0, shown.output
    assert_fits(shown, "training", "evaluating")
    training = shown.bars("training")
    assert "0/8" in training[0] and "8/8" in training[-1]
    assert {f"{step}/8" for step in (2, 4, 6, 8)} <= {bar.split()[-2] for bar in training}
    assert "val loss" in " ".join(shown.lines[2:4])  # below the bar, on as many lines as they need
    assert "8/8" in shown.bars("evaluating")[-1]  # two tasks of 4 records in one mode
    assert (
        shown.lines[0] == f"loading {place / 'base'}"
    )  # nothing of other libraries before, after or between
    assert shown.lines[1].startswith("training ") and shown.lines[2].startswith("loss "), shown.lines
    assert shown.lines[4].startswith("evaluating ") and shown.lines[5] == "Held-out scores", shown.lines


@pytest.mark.slow
def test_a_sequence_says_which_task_of_how_many_trains(place: Path) -> None:
    adapter = {"r": 2, "gate": {"kind": "task"}}
    sections = {"adapter": adapter, "continual": {"strategy": "independent"}, "eval": {"modes": ["task"]}}
    recipe = written(place, "sequence", max_steps=3, **sections)
    shown = in_terminal([*MOLORA, "continual", str(recipe)], cwd=place)
    assert shown.code == 0, shown.output
    assert_fits(shown, "tasks 1 of 2, copy", "tasks 2 of 2, reverse", "training", "evaluating")
    for number in (1, 2):
        both = [p for p in shown.pictures if f"tasks {number} of 2" in str(p) and "'training " in str(p)]
        assert both, shown.lines
    assert [line.split()[0] for line in shown.lines if COUNTED.search(line)] == ["tasks"]
    assert "".join(shown.lines).count("loading") == 1  # not anew for every turn


@pytest.mark.slow
def test_ctrl_c_leaves_a_whole_terminal_and_says_how_to_go_on(place: Path) -> None:
    recipe = written(place, "stopped", max_steps=100000)
    shown = in_terminal([*MOLORA, "train", str(recipe)], cwd=place, stop=lambda text: "loss " in text)
    assert shown.code == 130
    assert shown.output.count("\x1b[?25l") == shown.output.count("\x1b[?25h") > 0
    said = "\n".join(shown.lines)
    assert "\ninterrupted: stopped by a signal at step" in said and said.endswith("go on with --resume.")
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_pipe_gets_lines(place: Path) -> None:
    recipe = written(place, "piped")
    done = subprocess.run(
        [*MOLORA, "train", str(recipe)],
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout + done.stderr)
    lines = done.stderr.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        f"loading {place / 'base'}", "training: 8 steps", *(f"step {step}/8" for step in (2, 4, 6, 8)),
        "evaluating: 8 records",
    ]  # fmt: skip
    assert "Held-out scores" in done.stdout
    scored = subprocess.run(
        [*MOLORA, "eval", "runs/piped", "--json"], cwd=place, capture_output=True, text=True, check=True,
        env=_environment(),
    )  # fmt: skip
    assert json.loads(scored.stdout)["scores"]


@pytest.mark.slow
def test_an_encoder_loads_without_the_report_of_transformers(place: Path) -> None:
    write_encoder(place / "encoder")
    tasks = {
        "mood": {"source": "jsonl", "kind": "classification", "train": str(place / "mood.jsonl"), "eval": 0.2}
    }
    rows = [{"text": word * 3, "label": word} for word in ("good", "bad", "odd") for _ in range(5)]
    (place / "mood.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "encoder", "base": {"model": str(place / "encoder"), "task_type": "SEQ_CLS"},
        "adapter": {"r": 2, "num_experts": 2, "target_modules": ["query", "value"]}, "data": {"max_length": 64, "tasks": tasks},
        "train": {"max_steps": 2, "batch_size": 4}, "output": str(place / "runs"),
    }  # fmt: skip
    (place / "encoder.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shown = in_terminal([*MOLORA, "train", "encoder.yaml"], cwd=place)
    assert shown.code == 0, shown.output
    assert "LOAD REPORT" not in shown.output and "Loading weights" not in shown.output


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}

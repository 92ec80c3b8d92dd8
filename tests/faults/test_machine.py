"""Classes 3, 4, 5, 33: what the machine does to a run: a full disk, no memory, signals. Nothing is lost, and all is said."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from molora.errors import OutOfMemory
from molora.store.runs import Run
from molora.training.module import MoLoraModule
from molora.training.train import train
from tests.cli.conftest import ROOT, Cli
from tests.training.runs import assert_same_weights, recipe_for, write_base

SETTINGS: dict[str, Any] = {"max_steps": 4, "save_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine") / "base"
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe_for(base, tmp_path_factory.mktemp("full"), **SETTINGS))


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_for(base, tmp_path / "runs", **SETTINGS)))
    return file


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes, which is what a full disk does to the one being written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The lock and the environment; the recipe; the weights; the optimiser's state; the report and its pictures.
@pytest.mark.parametrize(
    "size", [900, 14_000, *(pytest.param(size, marks=pytest.mark.slow) for size in (10, 3_000, 45_000))]
)
def test_a_full_disk_is_named_and_the_run_goes_on_later(
    cli: Cli, recipe: Path, full: Run, tmp_path: Path, size: int
) -> None:
    with no_file_above(size):
        result = cli("train", recipe)
    assert result.code == 4, result.err
    assert "no room to write" in result.err and "free some space" in result.err
    started = (tmp_path / "runs" / "small" / "latest" / "config.yaml").is_file()
    assert cli("train", recipe, *(["--resume"] if started else [])).code == 0
    assert_same_weights(full.adapter, Run.find(tmp_path / "runs" / "small").adapter)


def test_memory_that_runs_out_says_what_to_lower(
    cli: Cli, recipe: Path, full: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = MoLoraModule.training_step

    def failing(self: MoLoraModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MoLoraModule, "training_step", failing)
    result = cli("train", recipe)
    assert result.code == 2 and "CUDA out of memory" in result.err and "lower train.batch_size" in result.err
    with pytest.raises(OutOfMemory):
        train(recipe)
    monkeypatch.undo()
    run = Run.find(tmp_path / "runs" / "small")
    assert [path.name for path in run.checkpoints] == ["step-000002"]
    assert cli("train", recipe, "--resume").code == 0
    assert_same_weights(full.adapter, run.adapter)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "molora.cli.main", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ},
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        ),  # under nohup it is ignored, and stays so
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_end_is_scored_leaves_a_run_that_goes_on(
    cli: Cli, recipe: Path, full: Run, tmp_path: Path, number: int
) -> None:
    adapter = tmp_path / "runs" / "small" / "latest" / "adapter"
    process = start(
        "train", recipe, "eval.max_new_tokens=1000000", "base.model=" + str(full.config.base.model)
    )
    wait_for(adapter, process)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: go on with --resume." in err and "Traceback" not in err
    assert cli("train", recipe, "--resume").code == 0
    run = Run.find(tmp_path / "runs" / "small")
    assert_same_weights(full.adapter, run.adapter)
    assert (run.path / "report.json").is_file()


@pytest.mark.slow
def test_a_closed_terminal_saves_training(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    """SIGHUP in the middle of training: a checkpoint, then exit 130; nohup's SIG_IGN is respected by the same rule."""
    process = start("train", recipe, "train.max_steps=100000", "train.save_every=100000")
    wait_for(tmp_path / "runs" / "small" / "latest" / "metrics.csv", process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by a signal at step" in err
    assert len(Run.find(tmp_path / "runs" / "small").checkpoints) == 1

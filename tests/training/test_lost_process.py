"""A process of a distributed run that dies is named, and what was saved stays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from molora.errors import InterruptedRun
from molora.store.runs import Run
from molora.training.lost_process import explained_loss_of_a_process
from tests.training.runs import recipe_for, start


def trainer(codes: list[int | None], world_size: int = 3) -> Any:
    started = [SimpleNamespace(poll=lambda code=code: code) for code in codes]
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=started))
    return SimpleNamespace(
        world_size=world_size, global_rank=0, node_rank=0, global_step=7, strategy=strategy
    )


def test_the_process_that_ended_is_named() -> None:
    for codes, words in (
        ([None, -signal.SIGKILL], "process 2 ended by SIGKILL"),
        ([2, None], "process 1 ended by exit code 2"),
    ):
        expected = pytest.raises(InterruptedRun, match=f"{words}, so process 0 of 3 stopped at step 7")
        with expected, explained_loss_of_a_process(trainer(codes)):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_loss_of_a_process(trainer([None])):
        raise RuntimeError("shapes differ")
    with (
        pytest.raises(RuntimeError, match="connection"),
        explained_loss_of_a_process(trainer([], world_size=1)),
    ):
        raise RuntimeError("connection reset")


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_says_so(base: Path, tmp_path: Path) -> None:
    settings = {"devices": 2, "accelerator": "cpu", "strategy": "ddp", "max_steps": 100_000, "save_every": 10}
    process = start(recipe_for(base, tmp_path, **cast(dict[str, Any], settings)))
    deadline = time.monotonic() + 200
    while not [*tmp_path.glob("small/*/checkpoints/step-000010")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    (child,) = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == InterruptedRun.exit_code, out
    assert "process 1 ended by SIGKILL" in out
    assert Run.find(tmp_path / "small").latest_checkpoint is not None

"""A second signal ends the process; random state is handed on exactly; meters and windows count right."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from molora.errors import DivergedError
from molora.store.runs import checkpoint_step, checkpoints, latest_valid
from molora.training.callbacks import Interrupt
from molora.training.checkpoint import Checkpoints, random_state, require_finite, restore_random_state
from molora.training.meter import Meter


def test_a_second_signal_exits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    interrupt = Interrupt(Checkpoints(tmp_path, 1, 1))
    interrupt._receive(signal.SIGINT, None)
    assert codes == []
    interrupt._receive(signal.SIGINT, None)
    assert codes == [130]


def draw() -> tuple[float, float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)


def test_random_state_survives_a_checkpoint_file(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value waiting inside the generator
    torch.save(random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_weights_that_are_not_finite_are_never_saved() -> None:
    layer = torch.nn.Linear(2, 2)
    require_finite(layer, 3)
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    with pytest.raises(DivergedError, match="step 3: weight"):
        require_finite(layer, 3)
    require_finite(layer.requires_grad_(False), 3)  # the base is not ours to judge


def test_checkpoints_are_ordered_by_step_and_leftovers_ignored(tmp_path: Path) -> None:
    for name in ("step-000900", "step-1000000", "step-000100", "step-000100.tmp-1-00000000", "other"):
        (tmp_path / name).mkdir()
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [100, 900, 1_000_000]
    assert latest_valid(tmp_path) is None  # none of them is complete
    assert checkpoint_step(None) == 0


def test_a_meter_gives_means_and_starts_anew() -> None:
    meter = Meter()
    meter.add(loss=torch.tensor(1.0))
    meter.add(loss=torch.tensor(3.0), grad_norm=torch.tensor(5.0))
    meter.count_tokens(torch.tensor(100))
    taken = meter.take()
    assert taken["loss"] == 2.0
    assert taken["grad_norm"] == 5.0
    assert taken["tokens_per_second"] > 0
    assert meter.take() == {}

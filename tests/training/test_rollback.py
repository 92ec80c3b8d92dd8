"""`train.on_nonfinite: rollback`: a batch without a finite loss is left out, and all else is as if it had never been learned."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import load_recipe
from molora.data.module import MoLoraDataModule
from molora.errors import ConfigError, DivergedError, InterruptedRun
from molora.store.runs import Run
from molora.training.module import MoLoraModule
from molora.training.objective import Supervised
from molora.training.train import train
from tests.training.runs import assert_same_weights, recipe_for

SETTINGS: dict[str, Any] = {"max_steps": 7, "save_every": 2, "log_every": 1, "on_nonfinite": "rollback"}
BAD = (0, 3)  # the fourth batch of the first epoch


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The loss of these batches is NaN, whenever they are seen."""
    bad = {BAD}
    step, loss = MoLoraModule.training_step, Supervised.loss
    here: list[Any] = []

    def noting(self: MoLoraModule, batch: Any, batch_idx: int) -> Any:
        here[:] = [self.trainer.train_dataloader.last]
        return step(self, batch, batch_idx)

    def spoil(self: Supervised, model: Any, batch: Any) -> Any:
        found, metrics = loss(self, model, batch)
        return (found * float("nan") if here[0] in bad else found), metrics

    monkeypatch.setattr(MoLoraModule, "training_step", noting)
    monkeypatch.setattr(Supervised, "loss", spoil)
    return bad


def without(
    base: Path, output: Path, left_out: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, **more: Any
) -> Run:
    """A run that never learned from some batches."""
    made = MoLoraDataModule.__init__

    def init(self: MoLoraDataModule, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.left_out |= left_out

    with monkeypatch.context() as patch:
        patch.setattr(MoLoraDataModule, "__init__", init)
        return train(recipe_for(base, output, **{**SETTINGS, **more}))


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_run_ends_as_if_the_batch_had_been_left_out(
    base: Path, tmp_path: Path, spoilt: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, accumulate: int,
) -> None:  # fmt: skip
    expected = without(base, tmp_path / "a", {BAD}, monkeypatch, accumulate=accumulate)
    with caplog.at_level(logging.WARNING):
        run = train(recipe_for(base, tmp_path / "b", **SETTINGS, accumulate=accumulate))
    assert_same_weights(expected.adapter, run.adapter)
    text = caplog.text
    assert "the training loss is nan at step" in text and "without batch 3 of epoch 0 (task" in text
    assert "record" in text


def test_it_goes_back_to_the_start_where_nothing_was_saved_yet(
    base: Path, tmp_path: Path, spoilt: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt.clear()
    spoilt.add((0, 0))
    expected = without(base, tmp_path / "a", {(0, 0)}, monkeypatch)
    assert_same_weights(expected.adapter, train(recipe_for(base, tmp_path / "b", **SETTINGS)).adapter)


def test_what_is_left_out_stays_out_of_a_resumed_run(
    base: Path, tmp_path: Path, spoilt: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(recipe_for(base, tmp_path / "a", **SETTINGS))
    step = MoLoraModule.training_step

    def interrupted(self: MoLoraModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 6:
            raise InterruptedRun("stop")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MoLoraModule, "training_step", interrupted)
        with pytest.raises(InterruptedRun):
            train(recipe_for(base, tmp_path / "b", **SETTINGS))
    spoilt.clear()  # so that only the checkpoint knows
    assert_same_weights(
        expected.adapter, train(recipe_for(base, tmp_path / "b", **SETTINGS), resume=True).adapter
    )


def test_a_gradient_that_is_not_finite_is_blamed_on_its_batch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is fine and the gradient is not: without a look at it, the next batch would be blamed."""
    loss = Supervised.loss

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * float("inf")

    seen: list[Any] = []
    step = MoLoraModule.training_step

    def noting(self: MoLoraModule, batch: Any, batch_idx: int) -> Any:
        seen[:] = [self.trainer.train_dataloader.last]
        return step(self, batch, batch_idx)

    def spoil(self: Supervised, model: Any, batch: Any) -> Any:
        found, metrics = loss(self, model, batch)
        return (Spoil.apply(found) if seen[0] == BAD else found), metrics

    expected = without(base, tmp_path / "a", {BAD}, monkeypatch)
    monkeypatch.setattr(MoLoraModule, "training_step", noting)
    monkeypatch.setattr(Supervised, "loss", spoil)
    assert_same_weights(expected.adapter, train(recipe_for(base, tmp_path / "b", **SETTINGS)).adapter)


def test_it_gives_up_after_three_batches(base: Path, tmp_path: Path, spoilt: set[tuple[int, int]]) -> None:
    spoilt.update((0, i) for i in range(5))
    with pytest.raises(DivergedError, match="the training loss is nan at step 3"):
        train(recipe_for(base, tmp_path, **SETTINGS))
    assert [path.name for path in Run.find(tmp_path / "small").checkpoints][-1] == "step-000002"


def test_several_devices_stop(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.on_nonfinite: 'rollback' goes with one device"):
        load_recipe(recipe_for(base, tmp_path, **SETTINGS, devices=2))

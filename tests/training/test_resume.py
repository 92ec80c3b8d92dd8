"""A run that is killed, stopped or diverges ends, resumed, with the very weights of an uninterrupted one."""

from __future__ import annotations

import csv
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from molora.errors import ConfigError, DivergedError, InterruptedRun
from molora.store.runs import Run, checkpoints, latest_valid
from molora.training.module import MoLoraModule
from molora.training.train import train
from tests.training.runs import adapter_weights, assert_same_weights, finish, recipe_for, start

# 5 batches an epoch in windows of 2: steps 1-3 are epoch 0 (the last one a window of one batch), 4-6 epoch 1.
SETTINGS: dict[str, Any] = {
    "max_steps": 7,
    "accumulate": 2,
    "save_every": 1,
    "val_every": 3,
    "keep_checkpoints": 2,
}


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run."""
    return train(recipe_for(base, tmp_path_factory.mktemp("full"), **SETTINGS))


def copied(full: Run, to: Path) -> Run:
    """The uninterrupted run again, to be changed."""
    shutil.copytree(full.path.parents[1], to, symlinks=True)
    return Run.find(to / "small")


def kill_and_resume(base: Path, output: Path, kill_at: int) -> Run:
    recipe = recipe_for(base, output, **SETTINGS)
    finish(start(recipe, kill_at=kill_at), -signal.SIGKILL)
    run = Run.find(output / "small")
    assert not run.adapter.exists()
    return train(recipe, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [6], ids=["after the epoch's end"])
def test_a_killed_run_resumes_bit_exactly(base: Path, full: Run, tmp_path: Path, kill_at: int) -> None:
    run = kill_and_resume(base, tmp_path, kill_at)
    assert_same_weights(full.adapter, run.adapter)
    assert metrics(run) == metrics(full)


def metrics(run: Run) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the time they took."""
    with (run.path / "metrics.csv").open() as file:
        return [
            {name: cell for name, cell in row.items() if cell and name != "tokens_per_second"}
            for row in csv.DictReader(file)
        ]


class Stop(Exception):
    """A crash at a chosen moment."""


def test_a_crash_after_a_checkpoint_loses_no_row_and_keeps_as_many_checkpoints(
    base: Path, full: Run, tmp_path: Path
) -> None:
    def crash(path: Path) -> None:
        if path.name == "step-000002":  # the checkpoint of step 4 is written, and this one not yet deleted
            raise Stop

    recipe = recipe_for(base, tmp_path, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("molora.training.checkpoint.remove_folder", crash)
        with pytest.raises(Stop):
            train(recipe)
    (tmp_path / "small" / "latest.tmp-1234567-00000000").symlink_to("nowhere")
    (tmp_path / "small" / "latest" / "checkpoints" / "step-000001.tmp-1234567-01234567").mkdir()
    run = train(recipe, resume=True)
    assert metrics(run) == metrics(full)
    assert_same_weights(full.adapter, run.adapter)
    assert [path.name for path in sorted((run.path / "checkpoints").iterdir())] == [
        path.name for path in full.checkpoints
    ]
    assert sorted(path.name for path in run.path.parent.iterdir()) == sorted([run.path.name, "latest"])


def test_a_run_resumed_where_it_had_ended_has_no_checkpoint_too_many(
    base: Path, full: Run, tmp_path: Path
) -> None:
    run = copied(full, tmp_path / "runs")
    shutil.copytree(run.checkpoints[0], run.path / "checkpoints" / "step-000001")
    train(recipe_for(base, tmp_path / "runs", **SETTINGS), resume=True)
    assert [path.name for path in run.checkpoints] == ["step-000006", "step-000007"]


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12])
def test_a_run_killed_at_any_batch_resumes_bit_exactly(
    base: Path, full: Run, tmp_path: Path, kill_at: int
) -> None:
    assert_same_weights(full.adapter, kill_and_resume(base, tmp_path, kill_at).adapter)


@pytest.mark.slow
def test_a_run_killed_from_outside_again_and_again_resumes_bit_exactly(
    base: Path, full: Run, tmp_path: Path
) -> None:
    recipe = recipe_for(base, tmp_path, **SETTINGS)
    for delay in (7.0, 8.0, 8.5, 9.0):
        process = start(recipe, resume=(tmp_path / "small" / "latest" / "config.yaml").is_file())
        time.sleep(delay)
        process.kill()
        process.communicate()
    finish(start(recipe, resume=(tmp_path / "small" / "latest" / "config.yaml").is_file()))
    assert_same_weights(full.adapter, Run.find(tmp_path / "small").adapter)


def test_a_signal_saves_once_and_the_run_resumes_bit_exactly(base: Path, full: Run, tmp_path: Path) -> None:
    settings = {**SETTINGS, "save_every": 100}

    def training_step(self: Any, batch: Any, batch_idx: int, plain: Any = MoLoraModule.training_step) -> Any:
        if self.global_step == 3 and batch_idx % 2 == 0:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLoraModule, "training_step", training_step)
        with pytest.raises(InterruptedRun, match="stopped by a signal at step 4") as caught:
            train(recipe_for(base, tmp_path, **settings))
    assert caught.value.exit_code == 130
    run = Run.find(tmp_path / "small")
    assert [path.name for path in checkpoints(run.path / "checkpoints")] == ["step-000004"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(recipe_for(base, tmp_path, **settings), resume=True)
    assert_same_weights(full.adapter, run.adapter)


def test_a_signal_while_training_is_being_set_up_interrupts_and_nothing_is_lost(
    base: Path, full: Run, tmp_path: Path
) -> None:
    """Before training hears signals itself, the command line makes each a KeyboardInterrupt."""

    def on_fit_start(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = recipe_for(base, tmp_path, **SETTINGS)
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLoraModule, "on_fit_start", on_fit_start)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert signal.getsignal(signal.SIGINT) is before
    assert_same_weights(full.adapter, train(recipe, resume=True).adapter)


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(base: Path, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int, plain: Any = MoLoraModule.training_step) -> Any:
        loss = plain(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 3 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLoraModule, "training_step", training_step)
        with pytest.raises(DivergedError, match="loss is nan at step") as caught:
            train(recipe_for(base, tmp_path, **SETTINGS))
    assert caught.value.exit_code == 5
    run = Run.find(tmp_path / "small")
    assert run.latest_checkpoint is not None
    assert run.latest_checkpoint.name == "step-000003"
    assert all(value.isfinite().all() for value in adapter_weights(run.latest_checkpoint).values())
    assert not run.adapter.exists()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    base: Path, full: Run, tmp_path: Path
) -> None:
    run = copied(full, tmp_path / "runs")
    shutil.rmtree(run.adapter)
    folder = run.path / "checkpoints"
    newest, before = checkpoints(folder)[-1], checkpoints(folder)[-2]
    state = newest / "trainer_state.pt"
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state.write_bytes(bytes(damaged))
    assert latest_valid(folder) == before
    again = train(recipe_for(base, tmp_path / "runs", **SETTINGS), resume=True)
    assert again.path == run.path
    assert_same_weights(full.adapter, again.adapter)


def test_a_newest_checkpoint_without_its_manifest_is_written_again(
    base: Path, full: Run, tmp_path: Path
) -> None:
    recipe = recipe_for(base, tmp_path / "runs", **SETTINGS)
    run = copied(full, tmp_path / "runs")
    newest = checkpoints(run.path / "checkpoints")[-1]
    (newest / "MANIFEST.json").unlink()
    train(recipe, resume=True)
    assert latest_valid(run.path / "checkpoints") == newest


def test_a_file_added_to_a_runs_adapter_stops_a_resume_before_it_trains(
    base: Path, full: Run, tmp_path: Path
) -> None:
    recipe = recipe_for(base, tmp_path / "runs", **SETTINGS)
    run = copied(full, tmp_path / "runs")
    (run.adapter / "notes.txt").write_text("mine")
    shutil.rmtree(checkpoints(run.path / "checkpoints")[-1])
    with pytest.raises(ConfigError, match=r": notes\.txt\."):
        train(recipe, resume=True)
    assert (run.adapter / "notes.txt").is_file() and len(checkpoints(run.path / "checkpoints")) == 1


def test_resuming_with_another_recipe_is_refused(base: Path, full: Run) -> None:
    recipe = recipe_for(base, full.path.parents[1], **{**SETTINGS, "lr": 0.5})
    with pytest.raises(ConfigError, match=r"other settings: train\.lr [\de.-]+ -> 0\.5\."):
        train(recipe, resume=True)


def test_resuming_a_finished_run_changes_nothing(base: Path, full: Run) -> None:
    before = adapter_weights(full.adapter)
    train(recipe_for(base, full.path.parents[1], **SETTINGS), resume=True)
    after = adapter_weights(full.adapter)
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_resumed_run_says_from_where_and_what_changed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe_for(base, tmp_path, max_steps=2))
    capsys.readouterr()
    longer = recipe_for(base, tmp_path, max_steps=4, keep_checkpoints=1)
    train(longer, resume=True)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "changed since the run began: train.max_steps 2 -> 4, train.keep_checkpoints 2 -> 1"
    assert f"going on with {run.path} from step 2 of 4" in told
    train(longer, resume=True)
    told = capsys.readouterr().err.splitlines()
    assert told[1].startswith(f"{run.path} is finished (4 of 4 steps): it is only scored again;")
    assert not [line for line in told if "changed" in line]

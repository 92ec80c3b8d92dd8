"""Loggers by name: a closed list, an error that names the extra, and numbers that stay in the run without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molora.config import RunConfig, load_recipe
from molora.errors import ConfigError
from molora.training import trackers
from molora.training.trackers import build_trackers, check_loggers
from tests.training.runs import recipe_for


def config(tmp_path: Path, loggers: Any) -> RunConfig:
    return load_recipe(recipe_for(tmp_path / "base", tmp_path, loggers=loggers))


@pytest.mark.parametrize(
    ("loggers", "said"),
    [
        (["tensorbord"], "Did you mean 'tensorboard'"),
        (["wandb", "wandb"], "names a logger twice"),
        ("wandb", "list"),
    ],
)
def test_the_list_is_closed(tmp_path: Path, loggers: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, loggers)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None if package == name else object())
    with pytest.raises(ConfigError, match=rf"pip install 'molora\[{name}\]'"):
        check_loggers(config(tmp_path, ["csv", name]).train)
    check_loggers(config(tmp_path, ["csv"]).train)


def test_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    known = {name: lambda *_, name=name: built.append(name) for name in trackers._BUILT}
    monkeypatch.setattr(trackers, "_BUILT", known)
    for there, loggers, wanted in (
        (True, None, ["tensorboard"]),
        (False, None, []),
        (True, ["csv"], []),
        (True, ["mlflow", "csv"], ["mlflow"]),
    ):
        monkeypatch.setattr(trackers, "find_spec", lambda _, there=there: object() if there else None)
        built.clear()
        build_trackers(config(tmp_path, loggers), tmp_path)
        assert built == wanted


def test_a_tracker_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no login\nand more")

    monkeypatch.setattr(trackers, "_BUILT", {"wandb": fails})
    with pytest.raises(
        ConfigError, match=r"wandb cannot start: no login\n  hint: .*metrics\.csv has everything"
    ):
        build_trackers(config(tmp_path, ["wandb"]), tmp_path)


@pytest.mark.slow
def test_tensorboard_keeps_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (logger,) = build_trackers(config(tmp_path, ["tensorboard"]), tmp_path)
    logger.log_metrics({"loss": 1.5}, step=10)
    logger.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 1.5)]


@pytest.mark.slow
def test_wandb_works_offline_and_each_training_has_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for turn in ("one", "two"):
        folder = tmp_path / "small" / turn
        folder.mkdir(parents=True)
        (logger,) = build_trackers(config(tmp_path, ["wandb"]), folder)
        logger.log_metrics({"loss": 1.5}, step=10)
        assert (logger.experiment.offline, logger.experiment.id) == (True, f"small-{turn}")
        assert logger.experiment.config["train"]["batch_size"] == 7
        logger.finalize("success")
        assert list((folder / "wandb").glob(f"offline-run-*-small-{turn}"))


@pytest.mark.slow
def test_mlflow_keeps_the_numbers_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step in (10, 20):
        (logger,) = build_trackers(config(tmp_path, ["mlflow"]), tmp_path)
        logger.log_metrics({"loss": step / 2}, step=step)
        logger.finalize("success")
    found: Any = logger
    history = found.experiment.get_metric_history(found.run_id, "loss")
    assert [(kept.step, kept.value) for kept in history] == [(10, 5.0), (20, 10.0)]
    assert found.experiment.get_run(found.run_id).data.params["train/batch_size"] == "7"

"""metrics.csv is complete after every row and continues exactly; the terminal shows one line per log."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from molora.progress import phase, shown
from molora.training.loggers import MetricsCsv, Terminal


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_written_at_once_and_a_new_metric_adds_a_column(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 2.0}, step=10)
    assert rows(log.path) == [{"step": "10", "loss": "2.0"}]
    log.log_metrics({"val_loss": 3.0}, step=10)
    log.log_metrics({"loss": 1.0}, step=20)
    assert rows(log.path) == [
        {"step": "10", "loss": "2.0", "val_loss": "3.0"},
        {"step": "20", "loss": "1.0", "val_loss": ""},
    ]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    for step in (10, 20, 30):
        log.log_metrics({"loss": float(step)}, step=step)
    resumed = MetricsCsv(log.path, resume_step=20)
    resumed.log_metrics({"loss": 31.0}, step=30)
    assert [(row["step"], row["loss"]) for row in rows(log.path)] == [
        ("10", "10.0"),
        ("20", "20.0"),
        ("30", "31.0"),
    ]


def test_each_log_is_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"loss": 1.5, "aux/balance": 1.01, "lr": 1e-3, "tokens_per_second": 5120.4, "odd": 3.0}
    with shown(), phase("training", 100, "steps") as training:
        Terminal(training).log_metrics(numbers, step=10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training: 100 steps", "step 10/100  loss 1.5  balance 1.01  lr 0.001  tokens/s 5,120"]


def test_the_newest_of_all_numbers_are_shown() -> None:
    with phase("training", 100, "steps") as training:
        terminal = Terminal(training)
        terminal.log_metrics({"loss": 1.5, "lr": 0.1}, step=10)
        terminal.log_metrics({"val_loss": 2.25}, step=10)
        assert training.text == "loss 1.5  lr 0.1  val loss 2.25"
        terminal.log_metrics({"loss": 1.0}, step=20)
        assert (training.done, training.text) == (20, "loss 1  lr 0.1  val loss 2.25")

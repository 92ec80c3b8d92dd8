"""metrics.csv is complete after every row and continues exactly; the terminal shows one line per log."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console

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


def test_without_a_terminal_each_log_is_a_line() -> None:
    out = io.StringIO()
    terminal = Terminal(100, Console(file=out, width=40))
    terminal.log_metrics(
        {"loss": 1.5, "aux/balance": 1.01, "lr": 1e-3, "tokens_per_second": 5120.4, "odd": 3.0}, step=10
    )
    assert out.getvalue() == "step 10/100  loss 1.5  balance 1.01  lr 0.001  tokens/s 5,120\n"


def test_on_a_terminal_a_bar_shows_the_newest_numbers() -> None:
    out = io.StringIO()
    terminal = Terminal(100, Console(file=out, width=120, force_terminal=True))
    terminal.log_metrics({"loss": 1.5}, step=10)
    terminal.log_metrics({"val_loss": 2.25}, step=20)
    terminal.finalize("success")
    assert "20/100" in out.getvalue()
    assert "loss 1.5  val loss 2.25" in out.getvalue()

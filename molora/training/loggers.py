"""Where metrics always go: metrics.csv and the terminal; trackers.py has those that a recipe names."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from molora.errors import AdapterError
from molora.progress import Phase


class _Metrics(Logger):
    """A logger of numbers alone: the run folder holds the configuration already."""

    version = ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class MetricsCsv(_Metrics):
    """One row per logged step, in a file that is complete after every row.

    A resumed run drops the rows after its checkpoint. A metric that appears later adds a column and rewrites the file.
    """

    name = "metrics"

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        if path.exists():
            self._continue(resume_step)

    def _continue(self, resume_step: int) -> None:
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                read = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise AdapterError(
                f"{self.path} cannot be continued: {error}.", hint="move it away; a new one is begun."
            ) from error
        rows = [{name: cell for name, cell in row.items() if name and cell} for row in read]
        self.rows = [
            row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) <= resume_step
        ]
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a row, or add to the last one if it has the same step."""
        columns = list(dict.fromkeys([*self.columns, *metrics]))
        same_step = bool(self.rows) and int(self.rows[-1]["step"]) == step
        if same_step:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
        if same_step or columns != self.columns or not self.path.is_file():
            self.columns = columns
            self._rewrite()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(self.rows[-1])

    @rank_zero_only
    def _rewrite(self) -> None:
        partial = self.path.with_suffix(".csv.part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


class Terminal(_Metrics):
    """The newest numbers, shown with the phase that training is; see molora.progress."""

    name = "terminal"

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.phase = phase
        self.numbers: dict[str, float] = {}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Show `metrics`."""
        self.phase.reach(self.phase.done if step is None else step)
        self.numbers.update(metrics)
        self.phase.tell(_text(metrics), _text(self.numbers))


_SHOWN = {
    "loss": "loss",
    "val_loss": "val loss",
    "grad_norm": "grad norm",
    "lr": "lr",
    "tokens_per_second": "tokens/s",
}


def _text(metrics: dict[str, float]) -> str:
    """`loss 1.234  balance 1.02  lr 0.001  tokens/s 5120`, in the order of the metrics."""
    wanted = [name for name in metrics if name in _SHOWN or name.startswith("aux/")]
    shown = {_SHOWN.get(name) or name.removeprefix("aux/"): metrics[name] for name in wanted}
    return "  ".join(
        f"{name} {value:,.0f}" if name == "tokens/s" else f"{name} {value:.4g}"
        for name, value in shown.items()
    )

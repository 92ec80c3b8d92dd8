"""`molora add-expert`: one more expert for a new task, in a new run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molora.errors import ConfigError

SOURCES = {".jsonl": "jsonl", ".gz": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def run(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    recipe: Path | None = None,
    task: str | None = None,
    data: Path | None = None,
    eval_data: Path | None = None,
    synthetic: str | None = None,
    resume: bool = False,
) -> None:
    """Grow, then print every task before and after."""
    source = _source(recipe, task, data, eval_data, synthetic)

    from molora.continual.grow import add_expert
    from molora.evaluation.report import Report
    from molora.report.tables import console, print_report

    grown = add_expert(path, source, overrides, resume=resume or None)
    to = console()
    print_report(Report.from_json((grown.path / "report.json").read_text(encoding="utf-8")), to=to)
    to.print(f"run: {grown.path}\nreport: {grown.path / 'report.html'}", markup=False)


def _source(
    recipe: Path | None, task: str | None, data: Path | None, eval_data: Path | None, synthetic: str | None
) -> Any:
    """The recipe file, or a recipe made of the options."""
    if recipe is not None:
        if task or data or eval_data or synthetic:
            raise ConfigError(
                "--recipe describes the task; leave out --task, --data, --eval-data and --synthetic."
            )
        return recipe
    if task is None or (data is None) == (synthetic is None):
        raise ConfigError(
            "say which task to add.",
            hint="give --recipe FILE, or --task NAME with --data FILE or --synthetic GENERATOR.",
        )
    if synthetic is not None:
        return {"task": {"name": task, "source": "synthetic", "generator": synthetic}}
    assert data is not None
    if data.suffix not in SOURCES:
        raise ConfigError(f"--data {data}: its ending is not one of {', '.join(SOURCES)}.")
    files = {"train": str(data)} | ({"eval": str(eval_data)} if eval_data is not None else {})
    return {"task": {"name": task, "source": SOURCES[data.suffix], **files}}

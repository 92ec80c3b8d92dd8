"""`molora compare`: two evaluations record by record, with tests of whether the difference is more than chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from molora.cli.options import AsJson

if TYPE_CHECKING:
    from molora.evaluation.paired import Comparison
    from molora.evaluation.predictions import Prediction

Evaluated = Annotated[
    Path, Argument(metavar="RUN", help="A run, an evaluation's folder, or its predictions.jsonl.")
]


def command(
    before: Evaluated,
    after: Evaluated,
    records: Annotated[int, Option(min=0, metavar="N", help="Show N records that changed.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Compare the predictions of two runs on the same held-out records.

    Both were made by `molora eval RUN --predictions`; of a run, its newest are taken. p is McNemar's exact test, the interval
    a paired bootstrap over records.

    Example: molora compare runs/quickstart runs/soft_mixture
    """
    from dataclasses import asdict

    from molora.evaluation.paired import compare
    from molora.evaluation.predictions import from_jsonl
    from molora.report.tables import console

    rows, changed = compare(from_jsonl(_file(before)), from_jsonl(_file(after)))
    to = console()
    if as_json:
        pairs = [{"before": asdict(one), "after": asdict(two)} for one, two in changed]
        plain = {"tasks": [asdict(row) for row in rows], "changed": pairs}
        to.print(json.dumps(plain, indent=2, ensure_ascii=False), markup=False, soft_wrap=True)
        return
    to.print(_table(rows))
    for one, two in changed[:records]:
        to.print(_line(one, two), markup=False, soft_wrap=True)
    if len(changed) > records:
        to.print(
            f"{len(changed) - records} more records changed; --records N shows more, --json all.",
            markup=False,
        )


def _file(place: Path) -> Path:
    """The newest predictions of a run, or those of an evaluation."""
    from molora.errors import AdapterError
    from molora.evaluation.predictions import PREDICTIONS_FILE
    from molora.store.runs import Run

    if place.is_file():
        return place
    if (place / PREDICTIONS_FILE).is_file():
        return place / PREDICTIONS_FILE
    run = Run.find(place)
    found = [report.parent / PREDICTIONS_FILE for report in run.reports]
    newest = [file for file in found if file.is_file()]
    if not newest:
        raise AdapterError(
            f"{run.path} has no predictions.", hint=f"molora eval {place} --predictions writes them."
        )
    return newest[0]


def _table(rows: list[Comparison]) -> object:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from molora.evaluation.modes import MODE_TITLES

    about = "Mean score of a record. macro_f1, bleu and chrf of all records together are in the reports."
    table = Table("task", "mode", box=box.SIMPLE_HEAD, caption=about, caption_justify="left")
    for name in ("records", "before", "after", "change (95 %)", "gained", "lost", "p"):
        table.add_column(name, justify="right")
    for row in rows:
        scale = 100.0 if row.share else 1.0
        values = [
            scale * value for value in (row.before, row.after, row.after - row.before, row.low, row.high)
        ]
        one, two, change, low, high = (
            f"{value:+.2f}" if i > 1 else f"{value:.2f}" for i, value in enumerate(values)
        )
        counts = ("", "", "") if row.p is None else (str(row.gained), str(row.lost), f"{row.p:.3g}")
        table.add_row(
            escape(row.task), MODE_TITLES.get(row.mode, row.mode), str(row.count), one, two,
            f"{change} ({low} to {high})", *counts,
        )  # fmt: skip
    return table


def _line(one: Prediction, two: Prediction) -> str:
    from molora.evaluation.modes import MODE_TITLES
    from molora.report.tables import visible

    where = f"{one.task}, {MODE_TITLES.get(one.mode, one.mode)}, record {one.record + 1}"
    if one.right is None:
        return f"{where}: {visible(one.prompt)}: {one.score:.4f} -> {two.score:.4f}"
    said = [f"{visible(p.prediction or 'no label')} ({'right' if p.right else 'wrong'})" for p in (one, two)]
    answer = "" if one.right or two.right else f"; it is {visible(one.answer)}"
    return f"{where}: {visible(one.prompt)}: {said[0]} -> {said[1]}{answer}"

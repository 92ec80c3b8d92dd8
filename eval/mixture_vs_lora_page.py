"""The page of the study of mixtures against one LoRA: a table for each suite, from its cells."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eval.continual_page import interval
from eval.mixture_vs_lora_grid import ARMS, SUITES, Suite, best_factor

PEERS = ("lora", "lora told")
Cells = Sequence[dict[str, Any]]


def score(cell: Mapping[str, Any]) -> float:
    """A cell's mean score over its tasks, 0 to 1."""
    return statistics.fmean(cell["scores"].values())


def best_runs(cells: Cells, suite: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm -> seed -> its cell at the arm's best learning rate; arms whose sweep is not finished are left out."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in ARMS:
        factor = best_factor(cells, suite, arm)
        chosen = [c for c in cells if (c["suite"], c["arm"], c["factor"]) == (suite, arm, factor)]
        if chosen:
            found[arm] = {cell["seed"]: cell for cell in chosen}
    return found


def differences(runs: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """By how much an arm is better than another one, for every seed that both have."""
    return [score(runs[seed]) - score(other[seed]) for seed in sorted(runs.keys() & other.keys())]


def verdict(values: Sequence[float]) -> str:
    """`wins` or `loses` where the 95 % interval over the seeds leaves out 0, `ties` where it does not; "" for one seed."""
    if len(values) < 2:
        return ""
    shown = interval(list(enumerate(values)))
    mean, half = (float(part) for part in shown.split(" ± "))
    if abs(mean) <= half:
        return "ties"
    return "wins" if mean > 0 else "loses"


def table(cells: Cells, suite: str) -> str:
    """One line per arm at its best learning rate: size, score, and the difference from each LoRA of the same seed."""
    runs = best_runs(cells, suite)
    if not runs:
        return "No arm has been run at all learning rates yet."
    peers = [arm for arm in PEERS if arm in runs]
    lines = [
        f"| arm | rank | parameters | lr | seeds | score | lowest task |{''.join(f' minus {p} |' for p in peers)}",
        f"|---|---|---|---|---|---|---|{'---|' * len(peers)}",
    ]
    for arm, seeds in runs.items():
        cell = next(iter(seeds.values()))
        rank = cell["rank"] if cell["experts"] is None else f"{cell['experts']} x {cell['rank']}"
        mean = interval([(seed, score(found)) for seed, found in seeds.items()])
        lowest = statistics.fmean(min(found["scores"].values()) for found in seeds.values())
        apart = "".join(f" {compared(seeds, runs[p]) if p != arm else ''} |" for p in peers)
        lines.append(
            f"| {arm} | {rank} | {cell['parameters']:,} | {cell['lr']:g} | {len(seeds)} | {mean} "
            f"| {100 * lowest:.1f} |{apart}"
        )
    return "\n".join(lines)


def compared(runs: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> str:
    """The paired difference with its interval, and whether the arm wins, ties or loses."""
    values = differences(runs, other)
    return f"{interval(list(enumerate(values)))} {verdict(values)}".strip()


def allowances(cells: Cells, suite: str) -> str:
    """The paired difference between each arm whose scale allows for the gate and its plain one; "" where none has both."""
    runs = best_runs(cells, suite)
    pairs = [(arm, f"{arm}, gate allowed for") for arm in ("top-2", "soft")]
    return "; ".join(
        f"{plain} {compared(runs[raised], runs[plain])}"
        for plain, raised in pairs
        if plain in runs and raised in runs
    )


def sweep(cells: Cells, suite: str) -> str:
    """Arm x learning rate, first seed."""
    settings = SUITES[suite]
    rates = [f"{settings.lr * factor:g}" for factor in settings.factors]
    lines = [f"| lr | {' | '.join(rates)} |", f"|---|{'---|' * len(rates)}"]
    for arm in settings.arms:
        found = {
            cell["factor"]: f"{100 * score(cell):.1f}"
            for cell in cells
            if (cell["suite"], cell["arm"], cell["seed"]) == (suite, arm, settings.seeds[0])
        }
        if found:
            lines.append(f"| {arm} | {' | '.join(found.get(factor, '') for factor in settings.factors)} |")
    return "\n".join(lines)


def section(cells: Cells, suite: str) -> str:
    """A suite's part of the page."""
    settings = SUITES[suite]
    parts = [f"## {settings.title[0].upper()}{settings.title[1:]}\n", f"{describe(settings)}\n"]
    parts.append(f"{table(cells, suite)}\n")
    if raised := allowances(cells, suite):
        parts.append(f"A scale that allows for the gate, minus the plain arm: {raised}.\n")
    if len(settings.factors) > 1:
        parts.append(f"Learning rates, seed {settings.seeds[0]}:\n\n{sweep(cells, suite)}\n")
    return "\n".join(parts)


def describe(suite: Suite) -> str:
    """What all arms of a suite share."""
    where = suite.targets if isinstance(suite.targets, str) else ", ".join(suite.targets)
    reads = (
        "The gates of all mixtures read the task's id" if suite.by_id else "Only `task` is told the task's id"
    )
    return (
        f"{suite.experts} experts of rank {suite.r} on {where} of {suite.base}; {suite.steps} steps of {suite.batch}, at "
        f"most {suite.max_length} tokens. {reads}."
    )


def page(cells: Cells) -> str:
    """The study's page."""
    present = [suite for suite in SUITES if any(cell["suite"] == suite for cell in cells)]
    arms = "\n".join(f"| {arm} | {what} |" for arm, what in ARMS.items())
    parts = [
        "# When a mixture beats one LoRA\n",
        "All arms of a suite have as many parameters (gates included; `task` has no gate, so it is a little smaller) and "
        "see the same batches in the same order. Scores are means over tasks of exact match, or accuracy among the "
        "labels of the task, in percent on held-out items, with 95 % intervals over seeds (Student's t: wide with three). "
        "The learning rate is chosen per arm by the first seed's score, on the same items, which flatters all arms alike. "
        "Differences pair runs of one seed; an arm wins or loses where that interval leaves out 0. Made by "
        "`python -m eval.mixture_vs_lora run` and `table`. `molora/tiny` is its version 1.\n",
        f"| arm | |\n|---|---|\n{arms}\n",
    ]
    return "\n".join([*parts, *(section(cells, suite) for suite in present)])

"""What the gates did: task x expert and layer x expert matrices, and experts that nothing uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

AVERAGED = ("share", "mean_weight", "top1_share", "entropy")
DEAD_BELOW = 0.1  # an expert is dead when its share is below this fraction of an even share, 1 / num_experts


@dataclass(frozen=True)
class Matrix:
    """A labelled table of numbers: `values[row][column]`."""

    rows: list[str]
    columns: list[str]
    values: list[list[float]]


@dataclass(frozen=True)
class RoutingSummary:
    """Routing statistics of one evaluation, padding excluded.

    mode: the evaluation mode they were recorded in. by_task: task -> expert -> mean gate weight over its
    tokens and all gates. gates: one row per gate and expert, with the keys
    `gate layer expert share mean_weight top1_share entropy` (entropy in nats).
    """

    mode: str
    tokens: int
    by_task: dict[str, dict[str, float]]
    gates: list[dict[str, Any]] = field(default_factory=list)

    def task_expert(self) -> Matrix:
        """Mean gate weight, task x expert."""
        experts = _ordered(expert for row in self.by_task.values() for expert in row)
        values = [[row.get(expert, 0.0) for expert in experts] for row in self.by_task.values()]
        return Matrix(list(self.by_task), experts, values)

    def layer_expert(self) -> Matrix:
        """Mean gate weight, layer x expert; the gates of one layer are averaged."""
        cells: dict[tuple[str, str], list[float]] = {}
        for row in self.gates:
            cells.setdefault((str(row["layer"]), row["expert"]), []).append(row["mean_weight"])
        layers, experts = _ordered(layer for layer, _ in cells), _experts(self.gates)
        return Matrix(layers, experts, [[_mean(cells.get((r, c), [])) for c in experts] for r in layers])

    def specialisation(self) -> float | None:
        """How far the tasks use different experts, 0 to 1; see `specialisation`."""
        return specialisation(self.task_expert().values)

    def shares(self) -> dict[str, float]:
        """Expert -> its share of what the gates chose, averaged over gates; sums to 1."""
        return expert_shares(self.gates)

    def dead_experts(self) -> list[str]:
        """Experts whose share is below a tenth of an even share."""
        return dead_experts(self.shares())


def summarise(mode: str, recorded: Mapping[str, tuple[int, Sequence[Mapping[str, Any]]]]) -> RoutingSummary:
    """One summary from the statistics of each task recorded alone: task -> (tokens, gate x expert rows).

    Tasks are recorded one at a time so that nothing needs task ids: the gate may be measured without
    knowing them. In the rows of the summary every token weighs the same, whatever its task.
    """
    total = sum(tokens for tokens, _ in recorded.values())
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    by_task = {}
    for task, (tokens, gates) in recorded.items():
        by_task[task] = _mean_of("mean_weight", gates)
        for gate in gates:
            key = gate["gate"], gate["expert"]
            row = rows.setdefault(key, {**gate, **dict.fromkeys(AVERAGED, 0.0)})
            for name in AVERAGED:
                row[name] += gate[name] * tokens / total if total else 0.0
    return RoutingSummary(mode, total, by_task, list(rows.values()))


def expert_shares(gates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rows of gate x expert statistics -> expert -> mean share over the gates that know the expert."""
    return _mean_of("share", gates)


def dead_experts(shares: Mapping[str, float]) -> list[str]:
    """Experts with a share below 0.1 / num_experts, in the order given; a single expert is never dead."""
    if len(shares) < 2:
        return []
    return [expert for expert, share in shares.items() if share < DEAD_BELOW / len(shares)]


def specialisation(weights: Sequence[Sequence[float]]) -> float | None:
    """How much of the task the choice of expert tells: mutual information over the most there could be.

    `(H(mean of the rows) - mean H(row)) / log(min(task, expert))`, each row made to sum to 1: every task weighs the
    same. 0 where all tasks are split alike, whether evenly or not; 1 where experts are as far apart as their number
    allows. Of a table averaged over gates it is a lower bound: gates that number their experts differently hide it.

    Args:
        weights: (task, expert) mean gate weights.

    Returns:
        None where it means nothing: fewer than two tasks or experts in use, or weights below 0.
    """
    rows = [[value / sum(row) for value in row] for row in weights if sum(row) > 0]
    bound = min(len(rows), len(rows[0])) if rows else 0
    if bound < 2 or min(map(min, rows)) < 0:
        return None
    together = [_mean(column) for column in zip(*rows, strict=True)]
    information = _entropy(together) - _mean([_entropy(row) for row in rows])
    return min(1.0, max(0.0, information / math.log(bound)))


def advice(dead: Sequence[str], *, mode: str) -> str | None:
    """One sentence on what to do about dead experts, or None when there are none."""
    if not dead:
        return None
    names = ", ".join(dead)
    if mode == "task":
        return f"No evaluated task uses: {names}. Map a task to it, or `remove_expert` to save the memory."
    remedy = "Raise adapter.aux_losses.balance, add adapter.gate.noise, or train with fewer experts."
    return f"Hardly used: {names}. {remedy}"


def _mean_of(value: str, gates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of a value over the rows of each expert."""
    return {e: _mean([row[value] for row in gates if row["expert"] == e]) for e in _experts(gates)}


def _experts(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    return _ordered(g["expert"] for g in gates)


def _entropy(shares: Sequence[float]) -> float:
    """In nats."""
    return -sum(share * math.log(share) for share in shares if share > 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))

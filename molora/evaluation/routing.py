"""What the gates did: task x expert and layer x expert matrices, and experts that nothing uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molora.evaluation.measures import dead_experts, specialisation

STATISTICS = ("share", "mean_weight", "top1_share", "entropy")
_DIGITS = 5  # of the weights by layer, which are many


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
    `gate layer expert share mean_weight top1_share entropy` (of the gate's probabilities, in nats) and `entropy_after` (of
    what was selected). layers: layer -> task -> expert -> mean weight over the layer's gates. Earlier reports lack the last two.
    """

    mode: str
    tokens: int
    by_task: dict[str, dict[str, float]]
    gates: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def task_expert(self) -> Matrix:
        """Mean gate weight, task x expert."""
        return _matrix(self.by_task)

    def layer_expert(self) -> Matrix:
        """Mean gate weight, layer x expert; the gates of one layer are averaged."""
        cells: dict[tuple[str, str], list[float]] = {}
        for row in self.gates:
            cells.setdefault((_layer_of(row), row["expert"]), []).append(row["mean_weight"])
        layers, experts = _ordered(layer for layer, _ in cells), _experts(self.gates)
        return Matrix(layers, experts, [[_mean(cells.get((r, c), [])) for c in experts] for r in layers])

    def of_task(self, task: str) -> Matrix:
        """Mean gate weight of one task, layer x expert."""
        return _matrix({layer: tasks[task] for layer, tasks in self.layers.items() if task in tasks})

    def entropies(self) -> dict[str, tuple[float, float | None]]:
        """Layer -> entropy of its gates' probabilities, and of what they selected (None in earlier reports), in nats."""
        found: dict[str, dict[str, tuple[float, float | None]]] = {}
        for row in self.gates:
            found.setdefault(_layer_of(row), {})[row["gate"]] = row["entropy"], row.get("entropy_after")
        means = {}
        for layer, gates in found.items():
            after = [selected for _, selected in gates.values() if selected is not None]
            means[layer] = _mean([before for before, _ in gates.values()]), _mean(after) if after else None
        return means

    def specialisation(self) -> float | None:
        """How far the tasks use different experts, 0 to 1; see `measures.specialisation`."""
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
    by_task, layers = {}, dict[str, dict[str, dict[str, float]]]()
    for task, (tokens, gates) in recorded.items():
        by_task[task] = _mean_of("mean_weight", gates)
        for layer in _ordered(_layer_of(gate) for gate in gates):
            means = _mean_of("mean_weight", [gate for gate in gates if _layer_of(gate) == layer])
            layers.setdefault(layer, {})[task] = {e: round(value, _DIGITS) for e, value in means.items()}
        for gate in gates:
            averaged = [name for name in (*STATISTICS, "entropy_after") if name in gate]
            row = rows.setdefault((gate["gate"], gate["expert"]), {**gate, **dict.fromkeys(averaged, 0.0)})
            for name in averaged:
                row[name] += gate[name] * tokens / total if total else 0.0
    return RoutingSummary(mode, total, by_task, list(rows.values()), layers)


def expert_shares(gates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rows of gate x expert statistics -> expert -> mean share over the gates that know the expert."""
    return _mean_of("share", gates)


def _layer_of(row: Mapping[str, Any]) -> str:
    """The number of the block a gate stands in; the gate's own name where it stands in none."""
    return str(row["gate"] if row["layer"] is None else row["layer"])


def _matrix(rows: Mapping[str, Mapping[str, float]]) -> Matrix:
    experts = _ordered(expert for row in rows.values() for expert in row)
    return Matrix(
        list(rows), experts, [[row.get(expert, 0.0) for expert in experts] for row in rows.values()]
    )


def _mean_of(value: str, gates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of a value over the rows of each expert."""
    found: dict[str, list[float]] = {}
    for row in gates:
        found.setdefault(row["expert"], []).append(row[value])
    return {expert: _mean(values) for expert, values in found.items()}


def _experts(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    return _ordered(g["expert"] for g in gates)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))

"""Numbers of what gates did: how even, how far one expert rules, how much layers agree, how far two adapters differ. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DEAD_BELOW = 0.1  # an expert is dead when its share is below this fraction of an even share, 1 / num_experts
RULES_FROM = 0.9  # an expert rules a gate when it is first for this share of the tokens


class Imbalance(NamedTuple):
    """How uneven shares are: the largest over the mean (1 even), squared coefficient of variation (0 even), and as how
    many equally used experts they count, exp(entropy)."""

    max_over_mean: float
    cv2: float
    effective: float


def imbalance(shares: Sequence[float]) -> Imbalance:
    """Of shares (expert,), which need not sum to 1; all 0 counts as even.

    Switch Transformers' and Shazeer et al.'s (arXiv:1701.06538) measures of load, without their coefficients.
    """
    total, size = sum(shares), len(shares)
    if not total:
        return Imbalance(1.0, 0.0, float(size))
    even = [share / total for share in shares]
    variance = _mean([(size * share - 1) ** 2 for share in even])
    return Imbalance(size * max(even), variance, math.exp(entropy(even)))


def entropy(shares: Sequence[float]) -> float:
    """In nats, of shares (expert,) that sum to 1."""
    return -sum(share * math.log(share) for share in shares if share > 0)


def information(weights: Sequence[Sequence[float]]) -> float | None:
    """Bits that the choice of expert tells about the task, every task as likely.

    `H(mean of the rows) - mean H(row)`, each row made to sum to 1: 0 where all tasks are split alike, log2(task) where
    no two tasks share an expert.

    Args:
        weights: (task, expert) mean gate weights.

    Returns:
        None where it means nothing: fewer than two tasks or experts in use, or weights below 0.
    """
    rows = [[value / sum(row) for value in row] for row in weights if sum(row) > 0]
    if min(len(rows), len(rows[0]) if rows else 0) < 2 or min(map(min, rows)) < 0:
        return None
    together = [_mean(column) for column in zip(*rows, strict=True)]
    nats = entropy(together) - _mean([entropy(row) for row in rows])
    return max(0.0, nats) / math.log(2)


def specialisation(weights: Sequence[Sequence[float]]) -> float | None:
    """`information` over the most there could be, log2(min(task, expert)): 0 to 1.

    0 where all tasks are split alike, whether evenly or not; 1 where experts are as far apart as their number allows. Of a
    table averaged over gates it is a lower bound: gates that number their experts differently hide it.
    """
    bits = information(weights)
    if bits is None:
        return None
    used = [row for row in weights if sum(row) > 0]
    return min(1.0, bits / math.log2(min(len(used), len(used[0]))))


def dead_experts(shares: Mapping[str, float]) -> list[str]:
    """Experts with a share below 0.1 / num_experts, in the order given; a single expert is never dead."""
    if len(shares) < 2:
        return []
    return [expert for expert, share in shares.items() if share < DEAD_BELOW / len(shares)]


def ruled_gates(gates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Gate -> the expert that is first there for nearly all tokens, whatever their task.

    Args:
        gates: rows of gate x expert statistics, as `RoutingSummary.gates`. A gate over one expert has nothing to rule.
    """
    sizes = Counter(row["gate"] for row in gates)
    return {
        row["gate"]: row["expert"]
        for row in gates
        if sizes[row["gate"]] > 1 and row["top1_share"] >= RULES_FROM
    }


def agreement(layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float | None:
    """How far layers send a task to the same expert: the share of layers that agree on it, averaged over tasks.

    1 where one expert is a task's largest in all layers; 1/layers at least. None without layers.

    Args:
        layers: layer -> task -> expert -> mean weight.
    """
    largest: dict[str, Counter[str]] = {}
    for tasks in layers.values():
        for task, weights in tasks.items():
            if weights and max(weights.values()) > 0:
                largest.setdefault(task, Counter())[max(weights, key=lambda name: weights[name])] += 1
    shares = [counts.most_common(1)[0][1] / counts.total() for counts in largest.values()]
    return _mean(shares) if shares else None


def drift(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Task -> how far its weights moved: total variation, half the sum of differences, each side made to sum to 1.

    0 where nothing changed, 1 where it uses other experts altogether. An expert that one side lacks counts as 0 there; tasks
    that only one side has are left out.

    Args:
        before, after: task -> expert -> mean weight, as `RoutingSummary.by_task`.
    """
    found = {}
    for task in before.keys() & after.keys():
        old, new = _normal(before[task]), _normal(after[task])
        found[task] = sum(abs(old.get(e, 0.0) - new.get(e, 0.0)) for e in old.keys() | new.keys()) / 2
    return {task: found[task] for task in after if task in found}


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `count` records, Wilson's; NaN for what is no share of anything."""
    if count < 1 or not 0 <= share <= 1:
        return math.nan, math.nan
    centre, spread = (
        share + z * z / (2 * count),
        z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2),
    )
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _normal(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values()) or 1.0
    return {name: value / total for name, value in weights.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

"""Two evaluations of the same records: what changed, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch

from molora.errors import AdapterError
from molora.evaluation.predictions import Prediction

RESAMPLES = 10_000
_CHUNK = 1_000_000  # drawn numbers held at once


@dataclass(frozen=True)
class Comparison:
    """One task in one mode, before and after, over `count` records that both have.

    gained, lost: records that only the second, only the first had right. p: of McNemar's exact test; None where a record is not
    right or wrong as a whole. share: the score is one of 1, not a loss. low, high: 95 % interval of the difference of the
    scores, by a paired bootstrap over records.
    """

    task: str
    mode: str
    count: int
    before: float
    after: float
    gained: int
    lost: int
    p: float | None
    share: bool
    low: float
    high: float


def compare(
    before: Sequence[Prediction], after: Sequence[Prediction]
) -> tuple[list[Comparison], list[tuple[Prediction, Prediction]]]:
    """Each task and mode that both have, and the pairs of predictions that differ in what was said or its worth.

    Raises:
        AdapterError: they have no records in common, or a record's prompt is not the same in both.
    """
    first = {(p.task, p.mode, p.record): p for p in before}
    pairs = [(first[key], p) for p in after if (key := (p.task, p.mode, p.record)) in first]
    if not pairs:
        raise AdapterError("the two evaluations have no task and mode in common.")
    for one, two in pairs:
        if one.prompt != two.prompt:
            raise AdapterError(
                f"record {one.record} of task {one.task!r} is not the same in both: {one.prompt[:60]!r} and "
                f"{two.prompt[:60]!r}.",
                hint="score both on the same held-out records (molora eval RUN --recipe FILE).",
            )
    groups: dict[tuple[str, str], list[tuple[Prediction, Prediction]]] = {}
    for pair in pairs:
        groups.setdefault((pair[0].task, pair[0].mode), []).append(pair)
    changed = [
        (one, two)
        for one, two in pairs
        if (one.prediction, one.right) != (two.prediction, two.right)
        or (one.right is None and one.score != two.score)
    ]
    return [_compared(*key, group) for key, group in groups.items()], changed


def _compared(task: str, mode: str, pairs: Sequence[tuple[Prediction, Prediction]]) -> Comparison:
    gained = sum(not one.right and bool(two.right) for one, two in pairs)
    lost = sum(bool(one.right) and not two.right for one, two in pairs)
    counts = torch.tensor([one.count for one, _ in pairs], dtype=torch.float64)
    scores = torch.tensor([[one.score, two.score] for one, two in pairs], dtype=torch.float64)
    sums = scores * counts.unsqueeze(1)
    total = counts.sum().clamp(min=1)
    whole = pairs[0][0].right is not None
    low, high = bootstrap(sums[:, 1] - sums[:, 0], counts)
    return Comparison(
        task, mode, len(pairs), float(sums[:, 0].sum() / total), float(sums[:, 1].sum() / total),
        gained, lost, mcnemar(gained, lost) if whole else None, whole or pairs[0][0].drawn is not None, low, high,
    )  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: how likely so uneven a split of the changes is if either way is even odds."""
    changes = gained + lost
    tail = sum(comb(changes, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changes)


def bootstrap(differences: torch.Tensor, counts: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `sum(differences) / sum(counts)`, both (record,) float64, over resampled records."""
    size = len(differences)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(0, RESAMPLES, step := max(1, min(RESAMPLES, _CHUNK // size))):
        drawn = torch.randint(size, (step, size), generator=generator)
        means.append(differences[drawn].sum(dim=1) / counts[drawn].sum(dim=1).clamp(min=1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

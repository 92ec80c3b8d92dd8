"""Which task a prompt belongs to, in closed form: what is kept of each task's features, and the ways to name by it.

All in float64. Nothing of the data is kept but sums, so any order and any split of the prompts give the same statistics, a
new task never changes the numbers of an older one, and what two machines learned is merged by adding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

_ROUNDING = 1e-6  # of features, in parts of their size: means of float32


@dataclass(frozen=True)
class TaskStatistics:
    """What is known of the features of some tasks, a row for each (or for each of its centres). Count 0: never seen."""

    counts: Tensor  # (task,) how many features each task showed
    means: Tensor  # (task, d)
    scatter: Tensor  # (d, d) Σ (x - mean of its row)(x - mean of its row)ᵀ over all rows
    spread: Tensor  # () how many features are in the scatter, those of tasks that were removed too

    @classmethod
    def of(cls, tasks: int, d: int) -> Self:
        """Nothing known yet of so many tasks, in features of width d."""
        shapes = (tasks,), (tasks, d), (d, d), ()
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def learned(self, task: int, features: Tensor) -> Self:
        """With more features (sample, d) of the task in row `task`."""
        x = features.to(self.means)
        if not len(x):
            return self
        mean = x.mean(dim=0)
        row = torch.zeros_like(self.counts)
        row[task] = 1
        return self.merged(
            replace(
                self,
                counts=len(x) * row,
                means=torch.outer(row, mean),
                scatter=(x - mean).t() @ (x - mean),
                spread=self.spread.new_tensor(len(x)),
            )
        )

    def merged(self, other: TaskStatistics) -> Self:
        """What both know together, of the same tasks: row by row."""
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        apart = other.means - self.means
        # Two batches of one task spread around their own means, and those around the common one.
        between = einsum(self.counts * share, apart, apart, "task, task i, task j -> i j")
        return replace(
            self,
            counts=counts,
            means=self.means + share.unsqueeze(-1) * apart,
            scatter=self.scatter + other.scatter + between,
            spread=self.spread + other.spread,
        )

    def rows(self, kept: list[int | None]) -> Self:
        """These rows in this order; None: room for a new task. The scatter keeps what removed tasks gave to it."""
        places = torch.tensor([-1 if row is None else row for row in kept], dtype=torch.long)
        places = places.to(self.counts.device)
        known = (places >= 0).to(self.counts)
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])[
            places
        ]  # -1 is the row of zeros at the end
        means = torch.cat([self.means, self.means.new_zeros(1, self.means.shape[1])])[places]
        return replace(self, counts=counts * known, means=means * known.unsqueeze(-1))


def oracle_shrinkage(covariance: Tensor, samples: Tensor) -> Tensor:
    """How far a covariance (d, d) of so many samples should be shrunk towards its mean variance, in (0, 1].

    The oracle approximating shrinkage of Chen et al., arXiv:0907.4698, for large d as in scikit-learn's `OAS`: it falls with the
    number of samples, and rises with how evenly the variance is spread.
    """
    square, trace = covariance.square().sum(), covariance.trace().square()
    uneven = (samples + 1) * (square - trace / len(covariance))
    return torch.where(uneven > 0, (square + trace) / uneven, 1.0).clamp(max=1.0)


class Gaussian:
    """One Gaussian per task, all with one covariance: linear discriminant analysis with every task equally likely.

    The covariance is shrunk towards its mean variance, `(1 - s) S + s tr(S)/d I`, so that few samples are enough.
    Reference: Lee et al., arXiv:1807.03888, who tell known from unknown inputs by the same densities.

    Args:
        known: the statistics; every task in them has been seen.
        shrinkage: s, in (0, 1]; `auto`: that of `oracle_shrinkage`.
        centres: rows per task, one after another.
    """

    clustered = False  # whether a task may have several centres

    @staticmethod
    def prepared(features: Tensor) -> Tensor:
        """Features (sample, d) as this kind reads them, before anything is learned or asked of them."""
        return features

    def __init__(self, known: TaskStatistics, shrinkage: float | str, centres: int = 1) -> None:
        self.known, self.centres, d = known, centres, known.means.shape[1]
        covariance = known.scatter / known.spread.clamp(min=1)
        s = oracle_shrinkage(covariance, known.spread) if isinstance(shrinkage, str) else shrinkage
        self.shrinkage = s
        level = covariance.trace() / d
        one = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
        # No spread but rounding's: the nearest mean names the task.
        self.flat = level <= (_ROUNDING * known.means).square().mean()
        level = torch.where(self.flat, 1.0, level)
        self.root = torch.linalg.cholesky((1 - s) * covariance + s * level * one)
        self.constant = -d / 2 * math.log(2 * math.pi) - self.root.diagonal().log().sum()
        self.means = self._white(known.means)

    def _white(self, rows: Tensor) -> Tensor:
        """Rows (row, d) in the space where the covariance is the identity."""
        return torch.linalg.solve_triangular(self.root, rows.t(), upper=False).t()

    def log_densities(self, features: Tensor) -> Tensor:
        """Features (sample, d) -> log density under each task's Gaussian (sample, task)."""
        apart = rearrange(self._white(features.to(self.means)), "s d -> s 1 d") - self.means
        return self.constant - apart.square().sum(dim=-1) / 2

    def left_out(self, row: int, features: Tensor, others: Sequence[int] = ()) -> Tensor:
        """Half the squared distances (sample, 1 + other) of features (sample, d) of one row to its mean and those of other rows,
        each of them as if it alone had not been learned.

        Without x its row's mean is n/(n-1) times as far from it, infinitely if it is the only one, and the scatter lacks
        n/(n-1) of its outer product (Sherman and Morrison). The shrinkage stays.
        """
        n, means = self.known.counts[row], self.means[[row, *others]]
        apart = rearrange(self._white(features.to(self.means)), "s d -> s 1 d") - means
        squares = apart.square().sum(dim=-1)
        more = n / (n - 1) if n > 1 else torch.zeros_like(n)
        weight = (1 - self.shrinkage) / self.known.spread * more
        along = einsum(apart, apart[:, 0], "s row d, s d -> s row").square()
        squares = squares + weight * along / (1 - weight * squares[:, :1]).clamp(min=1e-9)
        squares[:, 0] = squares[:, 0] * more.square() if n > 1 else torch.inf
        return squares / 2

    def mean_square(self, covariance: Tensor) -> Tensor:
        """() how far features of this covariance (d, d) are from their mean, on average: the squared distance."""
        return torch.cholesky_solve(covariance, self.root).trace()

    def posteriors(self, features: Tensor) -> Tensor:
        """Features (sample, d) -> how likely each task is (sample, task); rows sum to 1."""
        return self.log_densities(features).softmax(dim=-1)


class Ridge(Gaussian):
    """Ridge regression from features to tasks, the solution over all data at once; densities are those of `Gaussian`.

    `W = (Xᵀ X + λ I)⁻¹ Xᵀ Y` of centred X and Y, λ = shrinkage · tr(scatter)/d, with an intercept that is not shrunk. A score
    estimates how likely a task is where tasks are as frequent as among the prompts learned from.
    Reference: Any-SSR, arXiv:2503.13575.
    """

    def __init__(self, known: TaskStatistics, shrinkage: float | str, centres: int = 1) -> None:
        super().__init__(known, shrinkage, centres)
        counts, d = known.counts, known.means.shape[1]
        frequency = counts / counts.sum()
        mean = frequency @ known.means
        apart = known.means - mean
        level = known.scatter.trace() / d
        squares = known.scatter + einsum(counts, apart, apart, "task, task i, task j -> i j")
        squares.diagonal().add_(self.shrinkage * torch.where(self.flat, 1.0, level))
        self.weight = torch.linalg.solve(squares, (counts.unsqueeze(-1) * apart).t())  # (d, task)
        self.bias = frequency - mean @ self.weight

    def scores(self, features: Tensor) -> Tensor:
        """Features (sample, d) -> the regression's answer (sample, task); rows sum to 1, numbers may be negative."""
        return features.to(self.weight) @ self.weight + self.bias

    def posteriors(self, features: Tensor) -> Tensor:
        """The scores, without negative ones, over their sum."""
        positive = self.scores(features).clamp(min=0)
        return positive / positive.sum(dim=-1, keepdim=True)


class Prototypes(Gaussian):
    """Several centres per task, of features of unit length; the nearest one names the task.

    Reference: CoLoR, arXiv:2311.17601, which measures Euclidean distances (shrinkage 1) to 5 centres. The covariance is that
    around the centres, over all tasks.
    """

    clustered = True

    @staticmethod
    def prepared(features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def log_densities(self, features: Tensor) -> Tensor:
        """Those of each task's nearest centre."""
        densities = super().log_densities(features).masked_fill(self.known.counts == 0, -torch.inf)
        return rearrange(densities, "s (task centre) -> s task centre", centre=self.centres).amax(dim=-1)

"""The searches for weights of a sum: a grid over the simplex, LoraHub's gradient-free composition, optuna's TPE.

LoraHub: Huang et al., arXiv:2307.13269; release sail-sg/lorahub at df73afe: nevergrad's NGOpt from 0 within [-1.5, 1.5],
score `loss + 0.05 mean |w|`, 40 trials. Differs from it in two points: experts are summed as products, where the release sums
A and B apart, and the loss is the mean per target token, which the release divides by the number of records once more.

optuna: its tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) over the same bounds, by the loss alone, from equal
weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from molora.errors import ConfigError
from molora.progress import phase

BOUND = 1.5  # of LoraHub's weights
TRIALS = 40  # the release's max_inference_step
PENALTY = 0.05
MOST = 2000  # points of a grid

Score = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Trial:
    """Weights that were tried, in the order of the sources, and what they scored: the smaller the better."""

    weights: tuple[float, ...]
    loss: float
    score: float


def simplex(count: int, step: float) -> list[tuple[float, ...]]:
    """All weights of `count` experts that are multiples of `step` from 0 and sum to 1.

    Raises ConfigError where 1 is no multiple of the step, or there are too many.
    """
    parts = round(1 / step) if 0 < step <= 1 else 0
    if not parts or abs(parts * step - 1) > 1e-9:
        raise ConfigError(f"step is {step}; allowed: 1 divided by a whole number, such as 0.1 or 0.25.")
    if (points := comb(parts + count - 1, count - 1)) > MOST:
        raise ConfigError(
            f"a grid over {count} experts in steps of {step:g} has {points:,} points; at most {MOST:,}.",
            hint="take larger steps, fewer experts, or search lorahub.",
        )
    return [tuple(part / parts for part in split) for split in _splits(parts, count)]


def lorahub_score(loss: float, weights: Sequence[float]) -> float:
    """What LoraHub's release minimises."""
    return loss + PENALTY * sum(abs(w) for w in weights) / len(weights)


def _splits(total: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _splits(total - first, count - 1):
            yield (first, *rest)


def _grid(loss: Score, count: int, step: float) -> list[Trial]:
    points = simplex(count, step)
    tried = []
    with phase("trying weights", len(points), "trials") as shown:
        for weights in points:
            found = loss(weights)
            tried.append(Trial(weights, found, found))
            shown.advance()
    return tried


def _lorahub(loss: Score, count: int, trials: int, seed: int) -> list[Trial]:
    nevergrad = _package("nevergrad", "lorahub", trials)
    space = nevergrad.p.Array(init=[0.0] * count, lower=[-BOUND] * count, upper=[BOUND] * count)
    space.random_state.seed(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=trials)
    tried = []
    with phase("trying weights", trials, "trials") as shown:
        for _ in range(trials):
            asked = optimizer.ask()
            weights = tuple(float(w) for w in asked.value)
            found = loss(weights)
            tried.append(Trial(weights, found, lorahub_score(found, weights)))
            optimizer.tell(asked, tried[-1].score)
            shown.advance()
    return tried


def _optuna(loss: Score, count: int, trials: int, seed: int) -> list[Trial]:
    optuna = _package("optuna", "search", trials)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [str(i) for i in range(count)]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict.fromkeys(names, 1 / count))
    tried = []
    with phase("trying weights", trials, "trials") as shown:
        for _ in range(trials):
            asked = study.ask()
            weights = tuple(asked.suggest_float(name, -BOUND, BOUND) for name in names)
            found = loss(weights)
            tried.append(Trial(weights, found, found))
            study.tell(asked, found)
            shown.advance()
    return tried


def _package(name: str, extra: str, trials: int) -> Any:
    """The package that searches; ConfigError where it is missing, or there is nothing to try."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this search needs the package {name}, which is not installed.",
            hint=f"install the extra: pip install 'molora[{extra}]', or search grid.",
        ) from error
    if trials < 1:
        raise ConfigError(f"trials is {trials}; allowed: a whole number from 1.")
    return package


# name -> (loss, experts, step of the grid, trials, seed) -> what was tried
SEARCHES: dict[str, Callable[[Score, int, float, int, int], list[Trial]]] = {
    "grid": lambda loss, count, step, trials, seed: _grid(loss, count, step),
    "lorahub": lambda loss, count, step, trials, seed: _lorahub(loss, count, trials, seed),
    "optuna": lambda loss, count, step, trials, seed: _optuna(loss, count, trials, seed),
}

"""Metrics: what each held-out record's result is worth, and what all of them are: `overall` is the one place for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from molora.data.prompts import IGNORED
from molora.evaluation import texts
from molora.registry import Registry


@dataclass(frozen=True)
class Result:
    """What came of one held-out record.

    record: its place among the task's held-out records. prediction: an answer, the label it names (None: no label),
    or a class; target: what it should have been. nll: negative log-likelihood of the target in nats, where the
    metric is the loss. count: how many things the metric's value is a sum over: the target's tokens, or one record.
    text: what was written, where the prediction is the label that it names. value: what the answers are worth, where the metric
    does not see it from the prediction; drawn: all of them, and whether each is right, where there are several.
    """

    record: int
    prediction: str | int | None = None
    target: str | int | None = None
    nll: float = math.nan
    count: int = 1
    text: str | None = None
    value: float = math.nan
    drawn: tuple[tuple[str, bool], ...] | None = None


@dataclass(frozen=True)
class Metric:
    """`each`: what one result is worth, 1 the most. `together`: of all results, where that is not the mean of each."""

    each: Callable[[Result], float]
    together: Callable[[Sequence[Result]], float] | None = None

    def __call__(self, result: Result) -> float:
        return self.each(result)


def exact_match(result: Result) -> float:
    """1 for an answer that equals its target once whitespace around both is stripped, else 0."""
    return float(str(result.prediction).strip() == str(result.target).strip())


def accuracy(result: Result) -> float:
    """1 for the right label or class, else 0; naming no label is wrong."""
    return float(result.prediction is not None and result.prediction == result.target)


def loss(result: Result) -> float:
    """Nats over all of the target."""
    return result.nll


METRICS: Registry[Metric] = Registry("metric")
for _name, _metric in {
    "exact_match": Metric(exact_match),
    "accuracy": Metric(accuracy),
    "loss": Metric(loss),
    "likelihood": Metric(accuracy),
    "likelihood_norm": Metric(accuracy),
    "pass_at_k": Metric(lambda result: result.value),
    "macro_f1": Metric(accuracy, lambda rs: texts.macro_f1([(r.prediction, r.target) for r in rs])),
    "token_f1": Metric(lambda result: texts.token_f1(*_texts(result))),
    "rouge_l": Metric(lambda result: texts.rouge_l(*_texts(result))),
    "bleu": Metric(
        lambda result: texts.bleu([_texts(result)], alone=True), lambda rs: texts.bleu([*map(_texts, rs)])
    ),
    "chrf": Metric(lambda result: texts.chrf([_texts(result)]), lambda rs: texts.chrf([*map(_texts, rs)])),
}.items():
    METRICS.add(_name, _metric)


def _texts(result: Result) -> tuple[str, str]:
    """Answer and target."""
    return str(result.prediction), str(result.target)


def overall(name: str, results: Iterable[Result]) -> float:
    """The score of a metric over all results. Raises ValueError where nothing was counted."""
    results, metric = list(results), METRICS[name]
    return mean(metric, results) if metric.together is None or not results else metric.together(results)


def mean(metric: Callable[[Result], float], results: Iterable[Result]) -> float:
    """A metric over all results: every record, or every target token, weighs the same.

    Raises ValueError where nothing was counted: a score over nothing means nothing.
    """
    results = list(results)
    count = sum(result.count for result in results)
    if not results:
        raise ValueError("there are no results to take the mean of")
    if not count:
        raise ValueError("no labelled token was seen: every target is empty or was cut off by max_length")
    return sum(map(metric, results)) / count


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """The label a generated answer names: equal to it up to case and outer whitespace, else None."""
    wanted = text.strip().casefold()
    return next((label for label in labels if label.strip().casefold() == wanted), None)


def token_nll(logits: Tensor, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Each sample's summed negative log-likelihood (batch,) in nats, and the number of tokens (batch,) it sums over.

    logits (batch, seq, vocab), labels (batch, seq) with -100 where nothing is to be predicted. `shift`:
    position i predicts label i+1 (decoder-only models); without it, label i (encoder-decoder models).
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    nll = F.cross_entropy(logits.mT.float(), labels, ignore_index=IGNORED, reduction="none")
    return nll.sum(dim=1), (labels != IGNORED).sum(dim=1)


def perplexity(loss: float) -> float:
    """exp(loss in nats per token); infinite where the exponential overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf

"""Metrics: pure functions from predictions and targets to one number, and one streaming sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label of a position that no loss may read (prompt and padding)


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Share (0..1) of predictions that equal their target once whitespace around both is stripped.

    Raises ValueError when the two differ in length or are empty: a score over nothing means nothing.
    """
    _same_length(predictions, targets)
    return sum(p.strip() == t.strip() for p, t in zip(predictions, targets, strict=True)) / len(targets)


def accuracy(predictions: Sequence[object], targets: Sequence[object]) -> float:
    """Share (0..1) of predictions equal to their target; a prediction of None counts as wrong.

    Raises ValueError when the two differ in length or are empty.
    """
    _same_length(predictions, targets)
    return sum(p is not None and p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """The label a generated answer names: equal to it up to case and outer whitespace, else None."""
    wanted = text.strip().casefold()
    return next((label for label in labels if label.strip().casefold() == wanted), None)


def token_nll(logits: Tensor, labels: Tensor, *, shift: bool) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and how many tokens it is the sum of.

    logits (batch, seq, vocab), labels (batch, seq) with -100 where nothing is to be predicted. `shift`:
    position i predicts label i+1 (decoder-only models); without it, label i (encoder-decoder models).
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return float(total), int((labels != IGNORED).sum())


def perplexity(loss: float) -> float:
    """exp(loss in nats per token); infinite where the exponential overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass
class TokenLoss:
    """Streaming mean loss in nats per token: every token weighs the same, however batches were cut."""

    total: float = 0.0
    tokens: int = 0

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, *, shift: bool) -> None:
        """Add one batch; shapes as in `token_nll`."""
        total, tokens = token_nll(logits, labels, shift=shift)
        self.total += total
        self.tokens += tokens

    @property
    def mean(self) -> float:
        """Nats per token; raises ValueError before any labelled token was seen."""
        if self.tokens == 0:
            raise ValueError("no labelled token was seen: every target is empty or was cut off by max_length")
        return self.total / self.tokens


def _same_length(predictions: Sequence[object], targets: Sequence[object]) -> None:
    if len(predictions) != len(targets) or not targets:
        raise ValueError(
            f"need as many predictions as targets, at least one: got {len(predictions)} and {len(targets)}"
        )

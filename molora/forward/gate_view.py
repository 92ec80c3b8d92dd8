"""GateView: what one gate did in one forward, as auxiliary losses read it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from molora.calls.record import GateRecord
from molora.calls.task_ids import spread


class GateView:
    """One gate's answer. Rows (`tokens`) are tokens, or samples where the gate decides by sample.

    Attributes:
        learned: whether the gate decided, with a gradient: forced and task-id weights have none.
        logits, clean, probs, selected, weights: (tokens, expert): with and without noise; before selection; share of
            the slots (no gradient); after selection. Experts that are always on are not among them.
        mask: (tokens,) bool, true for what counts; None: everything.
        own: (tokens, expert) bool: the experts of the token's task.
        samples: (tokens,) the index of each token's sample, of `batch`.
        mean_probs, mean_inputs: (batch, expert) and (batch, d_in), over what counts.
        top_k, noise_std: settings.
    """

    def __init__(self, record: GateRecord, config: Any, mask: str = "padding") -> None:
        routing = record.routing
        self._record = record
        self.learned = routing.logits is not None
        self.by_token = routing.splits == 1 and len(routing.decided) == math.prod(record.lead)
        self._all = len(routing.decided) == 1
        self.noise_std, self.top_k = config.gate.noise_std, record.top_k
        kept = record.response if mask == "response" else record.mask
        self._kept = kept
        self.mask = kept if self.by_token else None

    @property
    def logits(self) -> Tensor:
        assert self._record.routing.logits is not None
        return self._record.routing.logits

    @property
    def clean(self) -> Tensor:
        clean = self._record.routing.clean
        return self.logits if clean is None else clean

    @property
    def probs(self) -> Tensor:
        return self._record.routing.probs

    @property
    def choices(self) -> Tensor | None:
        """(tokens,) how many experts each token may use; None: all of them."""
        scores = self._record.routing.scores
        return None if scores is None else (scores != float("-inf")).sum(dim=-1)

    @property
    def threshold(self) -> Tensor | float:
        """(tokens, 1), or one for all: what select: threshold compares the probabilities with."""
        threshold = self._record.routing.threshold
        assert threshold is not None  # the rules refuse what needs one elsewhere
        return threshold

    @property
    def selected(self) -> Tensor:
        return self._record.routing.selected

    @property
    def weights(self) -> Tensor:
        return self._record.routing.decided

    @property
    def batch(self) -> int:
        return self._record.lead[0] if self.by_token else len(self.weights)

    @cached_property
    def samples(self) -> Tensor:
        rows = torch.arange(self.batch, device=self.weights.device)
        return rows.repeat_interleave(len(self.weights) // self.batch)

    @cached_property
    def own(self) -> Tensor:
        record, device = self._record, self.weights.device
        columns = record.columns
        if record.task_ids is None:
            return torch.zeros(len(self.weights), len(columns), dtype=torch.bool, device=device)
        ids = record.task_ids.to(device)
        if not self.by_token:
            splits = record.routing.splits
            samples = len(self.weights) // splits
            ids = ids.reshape(record.lead[0], -1)[:: max(1, record.lead[0] // samples), 0].repeat_interleave(
                splits
            )
        table = record.task_map.visible_table(device, own_only=True)[:, list(columns)]
        return table[ids.clamp(min=0)] & (ids >= 0).unsqueeze(-1)

    @cached_property
    def mean_probs(self) -> Tensor:
        return self._by_sample(self.probs)

    @cached_property
    def mean_inputs(self) -> Tensor:
        assert self._record.x is not None
        x = self._record.x.float() if self._record.x.dtype != torch.float64 else self._record.x
        return self._by_sample(x.reshape(-1, x.shape[-1]))

    def _by_sample(self, rows: Tensor) -> Tensor:
        """Means (batch, ...) over the rows of each sample that count."""
        lead: Any = self._record.lead
        if len(rows) != math.prod(lead):
            return spread(rows, (max(len(rows), lead[0]),)) if len(rows) > 1 else rows.expand(lead[0], -1)
        by_sample = rows.reshape(lead[0], -1, rows.shape[-1])
        mask = self._kept
        if mask is None:
            return by_sample.mean(dim=1)
        kept = mask.reshape(lead[0], -1, 1).to(rows.dtype)
        return (by_sample * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)

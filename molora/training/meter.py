"""Meter: means of what happened since the last log line, without waiting for the device in between."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums detached scalars on their device and turns them into numbers only when read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._tokens: Tensor | None = None
        self._start = time.perf_counter()

    def add(self, **values: Tensor) -> None:
        """Add one observation of each named scalar."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def count_tokens(self, tokens: Tensor) -> None:
        """Add `tokens` (a scalar count) to the throughput."""
        self._tokens = tokens.detach() if self._tokens is None else self._tokens + tokens.detach()

    def state_dict(self) -> dict[str, Any]:
        """What the next means are of so far, as plain data on the host; not the throughput, which is of one process's time."""
        return {
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. A scalar of the host can be added to one of any device."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])

    def take(self) -> dict[str, Tensor]:
        """Means by name and `tokens_per_second`, as scalars on the device; starts a new period."""
        now = time.perf_counter()
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        if self._tokens is not None:
            means["tokens_per_second"] = self._tokens.float() / max(now - self._start, 1e-9)
        self._sums, self._counts, self._tokens, self._start = {}, {}, None, now
        return {name: torch.as_tensor(value) for name, value in means.items()}

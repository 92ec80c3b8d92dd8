"""What the sparse ways leave of a layer, until its base has its output: h, what it is multiplied by, and B."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from molora.experts import by_sample, by_token
from molora.experts.picks import Picked


@dataclass
class BySample:
    """One layer's h (sample, seq, rank) of each sample's experts; see `by_sample.expand`."""

    h: Tensor
    scale: Tensor  # (sample, rank)
    B: Picked
    rows: Tensor | None  # (sample,) which samples they are; None: all
    weights: Tensor | None = None  # (tokens, expert) or (1, expert), where somebody looks

    def add(self, y: Tensor) -> Tensor:
        """Add the mixture to the base's output."""
        return by_sample.expand(y, self.h, self.scale, self.B, self.rows)


@dataclass
class ByToken:
    """One layer's h (pair, rank) of each token and expert; see `by_token.expand`."""

    h: Tensor
    scale: Tensor  # (pair, rank) or (pair, 1)
    B: Tensor
    groups: by_token.Groups
    weights: Tensor | None = None  # as of BySample

    def add(self, y: Tensor) -> Tensor:
        """Add the mixture to the base's output."""
        return by_token.expand(y, self.h, self.scale, self.B, self.groups)


@dataclass
class Ready:
    """A `BySample` whose weights are in B (sample, rank, d_out) already: a step of a decoding."""

    h: Tensor
    B: Tensor
    rows: Tensor | None
    weights: Tensor | None = None

    def add(self, y: Tensor) -> Tensor:
        """Add the mixture to the base's output."""
        return by_sample.add(y, self.h, self.B, self.rows)

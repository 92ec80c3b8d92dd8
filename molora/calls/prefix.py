"""Prefix: where the virtual tokens of a batch stand, and what a model's arguments become by them.

    a row padded on the left     pad pad a b c     ->   pad pad P P P a b c
    a row padded on the right    a b c pad pad     ->   P P P a b c pad pad
    a row without any            a b c d e         ->   pad pad pad a b c d e

They stand behind the padding, not before it, so that a row computes in a batch what it does alone, whatever its model makes
of distances. PEFT's prompt tuning puts them first; without padding on the left both are the same. Rows without virtual tokens
(the base alone) have padding in their place. The positions that a row's own tokens have in its caller's eyes, n of them, are
always the last n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_PREFIX = "_molora_prefix"  # attribute of a key-value cache that begins with one


@dataclass(frozen=True, eq=False)
class Prefix:
    """The virtual tokens of a batch.

    Attributes:
        tokens: so many in each row that has them.
        starts: (batch,) positions of padding before them.
        given: (batch,) bool, whether a row has them.
    """

    tokens: int
    starts: Tensor
    given: Tensor

    @classmethod
    def before(cls, tokens: int, mask: Tensor, given: Tensor) -> Prefix:
        """In front of the first attended token of each row of a mask (batch, seq)."""
        return cls(tokens, (mask != 0).int().argmax(dim=1), given)

    def of_batch(self, batch: int) -> Prefix:
        """For a batch that repeats each sample in place, as beams do."""
        times = batch // len(self.starts)
        return Prefix(self.tokens, self.starts.repeat_interleave(times), self.given.repeat_interleave(times))

    @property
    def places(self) -> Tensor:
        """(batch, tokens) the positions of the virtual tokens."""
        return self.starts.unsqueeze(1) + torch.arange(self.tokens, device=self.starts.device)

    def room(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values (batch, seq) with room for virtual tokens, (batch, tokens + seq): `fill` wherever no token of the row's is."""
        return F.pad(values, (self.tokens, 0), value=fill)

    def attended(self, mask: Tensor) -> Tensor:
        """A mask (batch, seq) with the virtual tokens among what is attended."""
        given = self.given.to(mask.dtype).unsqueeze(1).expand(-1, self.tokens)
        return self.room(mask).scatter(1, self.places, given)

    def embedded(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Embeddings (batch, seq, d) with the vectors (batch, tokens, d) in their places."""
        places = self.places.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return F.pad(x, (0, 0, self.tokens, 0)).scatter(1, places, vectors.to(x.dtype))

    def labelled(self, labels: Tensor) -> Tensor:
        """Labels (batch, seq) of which virtual tokens have none; they predict the first token of a row where it has one.

        A row without them has nothing to predict its first position from, as in the base itself.
        """
        first = torch.where(self.given, labels[:, 0], -100).unsqueeze(1)
        return self.room(torch.cat([first, labels[:, 1:]], dim=1), -100)

    def positions(self, given: Tensor | None, mask: Tensor, newest: int) -> Tensor:
        """Position ids (batch, newest) of the last positions of a mask that `attended` made.

        Those that a caller gave for its own tokens (batch, seq) move on, and a row's virtual tokens take the first ones; else
        what is attended is counted, as generate() does.
        """
        if given is None:
            return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -newest:]
        given = given.expand(len(mask), -1)
        moved = given + (self.tokens * self.given).unsqueeze(1)
        if newest == given.shape[1]:
            return moved
        first = given.gather(1, self.starts.unsqueeze(1))
        return self.room(moved).scatter(
            1, self.places, first + torch.arange(self.tokens, device=given.device)
        )


def prefix_of(cache: Any) -> Prefix | None:
    """The prefix that a key-value cache begins with."""
    return getattr(cache, _PREFIX, None)


def keep_prefix(cache: Any, prefix: Prefix) -> None:
    """Let a key-value cache know what it begins with."""
    setattr(cache, _PREFIX, prefix)

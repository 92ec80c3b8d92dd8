"""Drawn answers, each from random numbers of its own: what it is answered beside changes nothing about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Draws:
    """Tokens by their probabilities at this temperature, from the likeliest that together have `top_p`.

    keys: of each prompt, the numbers that its random stream comes from; the same numbers draw the same answer again.
    """

    temperature: float
    top_p: float
    keys: Sequence[tuple[int, ...]]

    def processors(self, prompts: Sequence[int], steps: int) -> LogitsProcessorList:
        """For a greedy search over these prompts (their places in `keys`) of so many steps at most."""
        numbers = torch.stack([_numbers(self.keys[i], steps) for i in prompts])
        return LogitsProcessorList(
            [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p), Drawn(numbers)]
        )


def _numbers(key: tuple[int, ...], count: int) -> Tensor:
    """(count) uniform numbers below 1."""
    seed = int.from_bytes(sha256(repr(key).encode()).digest()[:8], "big")
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


class Drawn(LogitsProcessor):
    """Leaves of each row the one token that its next number draws, by the inverse of the distribution function.

    numbers: (batch, steps), below 1.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.step = numbers, 0

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """scores: (batch, vocabulary); so is the answer."""
        up_to = scores.float().softmax(dim=-1).cumsum(dim=-1)
        number = self.numbers[:, self.step : self.step + 1].to(up_to.device)
        self.step += 1
        # right: a token without probability is never drawn, not even by the number 0.
        token = torch.searchsorted(up_to, number * up_to[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, token, 0.0)  # type: ignore[return-value]

"""TaskCores: a small matrix per task between the shared A and the experts' B (MTL-LoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from molora.experts.stack import Stack


class TaskCores(Stack):
    """`Λ_t (rank, rank)` for each task id t, the identity at first: `h = Λ_t A x`.

    Rows are tasks, in blocks as of a learned task gate, so that the cores of earlier tasks stay as they are.
    Reference: MTL-LoRA, arXiv:2410.09437.
    """

    @classmethod
    def identity(cls, rank: int, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> Self:
        """Cores that change nothing, one for each of `frozen`."""
        return cls(cls.one(rank).repeat(len(frozen), 1), blocks, frozen)

    @staticmethod
    def one(rank: int) -> Tensor:
        """The row of the identity."""
        return torch.eye(rank).flatten()

    @property
    def rank(self) -> int:
        """Of the matrices."""
        return int(self.weight.shape[1] ** 0.5)

    def grow(self, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> None:
        """Give each task beyond those there are the identity."""
        weight = self.weight.detach()
        fresh = self.one(self.rank).to(weight).expand(len(frozen) - len(weight), -1)
        self.assign(torch.cat([weight, fresh]), blocks, frozen)

    def of_samples(self, shares: Tensor) -> Tensor:
        """Each sample's row: the mean of its tasks', the identity's for the base only."""
        nobody = (~shares.any(dim=1)).to(self.weight.dtype)
        return shares.to(self.weight.dtype) @ self.weight + nobody[:, None] * self.one(self.rank).to(
            self.weight
        )

    def matrices(self, shares: Tensor) -> Tensor:
        """Each sample's core, (sample, rank, rank)."""
        return rearrange(self.of_samples(shares), "n (row column) -> n row column", row=self.rank)

    def forward(self, h: Tensor, shares: Tensor) -> Tensor:
        """`Λ h` of every token: h (tokens, rank), shares (sample, task) with samples in the order of tokens."""
        cores = self.matrices(shares).to(h.dtype)
        by_sample = h.reshape(len(cores), -1, h.shape[-1])
        return (by_sample @ cores.mT).reshape(h.shape)


class DiagonalCores(TaskCores):
    """A Λ_t that is diagonal: a number for each of the rank's dimensions, rank times fewer than a whole matrix.

    Reference: `diagonal_format` of MTL-LoRA's layer (pUmpKin-Co/MTL-LoRA at 7848a70).
    """

    @staticmethod
    def one(rank: int) -> Tensor:
        return torch.ones(rank)

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    def matrices(self, shares: Tensor) -> Tensor:
        return torch.diag_embed(self.of_samples(shares))

    def forward(self, h: Tensor, shares: Tensor) -> Tensor:
        diagonals = self.of_samples(shares).to(h.dtype)
        by_sample = h.reshape(len(diagonals), -1, h.shape[-1])
        return (by_sample * diagonals.unsqueeze(1)).reshape(h.shape)

"""TaskCores: a small matrix per task between the shared A and the experts' B (MTL-LoRA)."""

from __future__ import annotations

from collections.abc import Sequence

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
    def identity(cls, rank: int, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> TaskCores:
        """Cores that change nothing, one for each of `frozen`."""
        return cls(torch.eye(rank).flatten().repeat(len(frozen), 1), blocks, frozen)

    def grow(self, blocks: Sequence[Sequence[int]], frozen: Sequence[bool]) -> None:
        """Give each task beyond those there are the identity."""
        weight = self.weight.detach()
        eye = torch.eye(int(weight.shape[1] ** 0.5), dtype=weight.dtype, device=weight.device).flatten()
        self.assign(torch.cat([weight, eye.expand(len(frozen) - len(weight), -1)]), blocks, frozen)

    def matrices(self, shares: Tensor) -> Tensor:
        """Each sample's core (sample, rank, rank): the mean of its tasks', the identity for the base only."""
        rank = int(self.weight.shape[1] ** 0.5)
        mixed = shares.to(self.weight.dtype) @ self.weight
        cores = rearrange(mixed, "n (row column) -> n row column", row=rank)
        nobody = (~shares.any(dim=1)).to(cores.dtype)
        return cores + nobody[:, None, None] * torch.eye(rank, dtype=cores.dtype, device=cores.device)

    def forward(self, h: Tensor, shares: Tensor) -> Tensor:
        """`Λ h` of every token: h (tokens, rank), shares (sample, task) with samples in the order of tokens."""
        cores = self.matrices(shares).to(h.dtype)
        by_sample = h.reshape(len(cores), -1, h.shape[-1])
        return (by_sample @ cores.mT).reshape(h.shape)

"""SLAO: one LoRA; each task starts from an orthogonal basis of the last A, and is merged into what was before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.config.continual import StrategyConfig
from molora.continual.strategy import Strategy, Turn, expert_layers


class Slao(Strategy):
    """Constant memory: after task t, `A = A_t` and `B = B_old + (B_t - B_old)/√t`; before it, A gets orthonormal rows.

    Training starts from the merged B (the paper's text leaves the start open).
    Reference: SLAO, arXiv:2512.23017.
    """

    changes_weights = True

    def __init__(self, settings: StrategyConfig) -> None:
        super().__init__(settings)
        self._merged: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_task(self, model: nn.Module, turn: Turn) -> None:
        self._merged = {}
        for key, _, bank in expert_layers(model):
            A_rows, B = bank.stacks["A"].trainable, bank.stacks["B"].trainable
            assert A_rows is not None and B is not None
            self._merged[key] = B.detach().clone()
            if turn.index:
                for A in A_rows:
                    A.copy_(orthonormal(A))

    @torch.no_grad()
    def after_task(self, model: nn.Module, turn: Turn) -> None:
        for key, _, bank in expert_layers(model):
            B = bank.stacks["B"].trainable
            assert B is not None
            B.copy_(merged(self._merged[key].to(B), B, turn.index + 1))

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self._merged = {}


def orthonormal(A: Tensor) -> Tensor:
    """Orthonormal rows (rank, d) with the span of A's, each on the side of the row it came from; zeros beyond d.

    LAPACK leaves the signs open; with wrong ones B, which goes on from where it was, would undo what was learned.
    """
    Q, R = torch.linalg.qr(A.float().t())
    rows = (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).t()
    return F.pad(rows, (0, 0, 0, len(A) - len(rows)))


def merged(old: Tensor, new: Tensor, count: int) -> Tensor:
    """What B becomes after the `count`-th task."""
    return old + (new - old) / count**0.5

"""BiLoRA: singular values learn on one half of the data, singular vectors on the other, in turn.

    ΔW = s · P Λ Q,  Λ diagonal and 0 at first, P and Q from N(0, 0.02²)

Two levels: the vectors are fitted to half of each task's training records, the values to the other half, so that no value
grows on what its vectors have merely learnt by heart. Each step of the optimiser is of one half; the first one is of the values,
since vectors have no gradient where values are 0. Gates and heads learn on both. `aux_losses: {orthonormal: 0.1}` keeps P and
Q close to orthonormal. Not taken over: the paper differentiates through one step of the vectors (DARTS); here each half is a
first-order step, as in its approximation. The halves are made by `molora train` and what else trains recipes; under another
loop, values and vectors learn together.

Reference: BiLoRA, arXiv:2403.13037.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from molora.experts.kinds.adalora import singular_rows
from molora.experts.kinds.kind import About, Expert, Kind, StackSpec


class BiLora(Kind):
    """A is Q, B is Pᵀ, E is Λ, as of `adalora`, without a budget."""

    about = About(
        "BiLoRA, arXiv:2403.13037",
        "singular values of each expert on one half of the data, singular vectors on the other, in turn",
        "small data, where experts learn records by heart; half of the steps go to each, so give it twice as many",
    )
    starts_by_init = False
    orthonormal = True
    upper: ClassVar[frozenset[str]] = frozenset({"E"})

    def specs(self) -> dict[str, StackSpec]:
        return {
            "A": StackSpec("rank d_in"),
            "E": StackSpec("rank", role="B"),
            "B": StackSpec("rank d_out", on_disk="d_out rank", role="B"),
        }

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        A, B = (torch.empty(rank, d).normal_(std=0.02) for d in (d_in, d_out))
        return {"A": A, "E": A.new_zeros(rank), "B": B}

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return rows["A"], rows["B"] * rows["E"].unsqueeze(-1)

    def rows_of(self, expert: Expert) -> dict[str, Tensor]:
        return singular_rows(expert)

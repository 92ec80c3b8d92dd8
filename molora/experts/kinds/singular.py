"""What kinds of experts have in common that learn singular values between two sets of vectors, ΔW = s · P Λ Q."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from molora.experts.kinds.kind import Expert, Kind, StackSpec


class Singular(Kind):
    """A is Q, B is Pᵀ, both from N(0, 0.02²); E is Λ, 0 at first."""

    starts_by_init = False
    orthonormal = True

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


def singular_rows(expert: Expert) -> dict[str, Tensor]:
    """Singular values E and vectors A, B of an expert's B A, without a matrix of its size."""
    compute = torch.promote_types(expert.A.dtype, torch.float32)
    left, upper = torch.linalg.qr(expert.B.detach().to(compute))
    right, lower = torch.linalg.qr(expert.A.detach().to(compute).t())
    U, S, Vh = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    rows = {"A": (right @ Vh.t()).t(), "E": S, "B": (left @ U).t()}
    short = expert.rank - len(S)  # a rank beyond the layer's own width
    pads = {"A": (0, 0, 0, short), "E": (0, short), "B": (0, 0, 0, short)}
    return {name: torch.nn.functional.pad(row, pads[name]).to(expert.A.dtype) for name, row in rows.items()}

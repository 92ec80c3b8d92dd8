"""Core: each expert is a matrix (rank, rank) between one A and one B that all experts of a layer share.

    y = W x + s · B (Σ_e g_e C_e) A x

The cheapest mixture but VeRA's: a layer has the parameters of one LoRA, and rank² more for each expert. Ours starts with
C = 0 between an A and a B drawn at random, so that an expert which joins later changes nothing however far A and B went.
A and B are frozen as soon as one expert is; those that join learn their cores only. Not taken over: the paper's gate reads
A x; here it is any gate.

Reference: CoMoL, arXiv:2603.00573.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from molora.experts.kinds.kind import About, Kind, StackSpec


class Core(Kind):
    """`C` is saved as in the formula, and kept as its transpose, which multiplies B from the left."""

    about = About(
        "CoMoL, arXiv:2603.00573",
        "a matrix (rank, rank) of each expert, and one A and B for all experts of a layer",
        "many experts for the numbers of about one LoRA, trained together; experts that join later learn cores only",
    )
    one_A = True
    imports = "its experts are cores between an A and a B that all share, which hold no factors of others"

    def specs(self) -> dict[str, StackSpec]:
        return {
            "A": StackSpec("rank d_in", shared=True),
            "B": StackSpec("rank d_out", on_disk="d_out rank", shared=True, role="B"),
            "C": StackSpec("rank core", on_disk="core rank", role="B"),
        }

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        A, B = init_A(torch.empty(rank, d_in)), init_A(torch.empty(rank, d_out))
        return {"A": A, "B": B, "C": A.new_zeros(rank, rank)}

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        cores = rows["C"]
        # Not `@`, which joins the cores in one product or does not: an expert's bits would depend on the others.
        return rows["A"], torch.bmm(cores, rows["B"].expand(len(cores), -1, -1))

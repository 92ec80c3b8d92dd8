"""LoRA: an expert's own parameters are its two factors. With one A for all experts it is HydraLoRA.

References: LoRA, arXiv:2106.09685; HydraLoRA, arXiv:2404.19245.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from molora.config.section import Problem
from molora.experts.kinds.kind import About, Expert, Kind, StackSpec


class Lora(Kind):
    """`B` is kept as (rank, d_out), so that flattening a stack for the kernel is a view."""

    about = About(
        "LoRA, arXiv:2106.09685; with share_A HydraLoRA, arXiv:2404.19245",
        "A and B of each expert",
        "the default: exact import and export of ordinary LoRAs, and every loss and strategy",
    )
    keeps_factors = True
    grows = True

    def specs(self) -> dict[str, StackSpec]:
        return {
            "A": StackSpec("rank d_in", shared=self.shares_A),
            "B": StackSpec("rank d_out", on_disk="d_out rank", role="B"),
        }

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        A = init_A(torch.empty(rank, d_in))
        return {"A": A, "B": A.new_zeros(rank, d_out)}

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return rows["A"], rows["B"]

    def rows_of(self, expert: Expert) -> dict[str, Tensor]:
        return {"A": expert.A, "B": expert.B.t()}

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        return iter(())

"""LoRA-FA: A stays as it was drawn, only B learns.

Reference: LoRA-FA, arXiv:2308.03303.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from molora.config.section import Problem
from molora.experts.kinds.kind import About, Kind, StackSpec
from molora.experts.kinds.lora import Lora


class LoraFA(Lora):
    """A LoRA with a frozen A. An imported or averaged one keeps the A it comes with."""

    about = About(
        "LoRA-FA, arXiv:2308.03303",
        "B of each expert; A stays as it was drawn",
        "half of the numbers and of the optimiser's memory at the same rank",
    )

    def specs(self) -> dict[str, StackSpec]:
        stacks = super().specs()
        return {**stacks, "A": replace(stacks["A"], trained=False)}

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        return Kind.problems(mixture)

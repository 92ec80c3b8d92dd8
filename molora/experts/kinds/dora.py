"""DoRA: an expert learns the direction of the whole weight by a LoRA, and its magnitude by a vector.

    y = base(x) + Σ_e g_e (m_e ∘ (W + s_e B_e A_e) x / ‖W + s_e B_e A_e‖ - W x)

The norm is that of each row, one for each output. Where the weights g sum to 1 this is Σ_e g_e m_e ∘ (W + s_e B_e A_e) x / ‖·‖.
m starts as ‖W‖, so that a new expert changes nothing; no gradient flows through the norm, as published. Ours: dropout acts on
what A reads, not on W x. The norm is computed without a matrix of W's size, from ‖W‖², W Aᵀ and A Aᵀ.

Reference: DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from molora.config.section import Problem
from molora.experts.kinds.kind import About, Expert, Kind, StackSpec
from molora.experts.kinds.lora import Lora


class Dora(Lora):
    """One for each layer, which knows the base's weight there."""

    about = About(
        "DoRA, arXiv:2402.09353",
        "A and B of each expert, and a vector (d_out) of the magnitudes of the whole weight's rows",
        "more accuracy at small ranks, for a slower step and more memory; experts start from the base's own directions",
    )
    keeps_factors = False
    by_layer = True
    scales_output = True
    averages = "the mean of experts of kind dora scales the base's output too, which two factors cannot say"

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        super().__init__(share_A, **settings)
        self._squares: dict[Any, Tensor] = {}

    def specs(self) -> dict[str, StackSpec]:
        return {**super().specs(), "m": StackSpec("d_out")}

    def new(self, d_in: int, d_out: int, rank: int, init_A: Any) -> dict[str, Tensor]:
        rows = super().new(d_in, d_out, rank, init_A)
        assert self.base is not None
        if rows["A"].is_meta or self.base.is_meta:  # the values come from a file
            return {**rows, "m": rows["B"].new_ones(d_out)}
        return {**rows, "m": self.norms(rows["A"][None], rows["B"][None], [1.0])[0]}

    def rows_of(self, expert: Expert) -> dict[str, Tensor]:
        A, B = expert.A.detach(), expert.B.detach().t()
        norms = self.norms(A[None], B[None], [expert.scaling])[0]
        return {"A": A, "B": B, "m": norms.to(A.dtype)}

    def output_scale(self, rows: Mapping[str, Tensor], scalings: Sequence[float]) -> Tensor:
        m = rows["m"]
        norms = self.norms(rows["A"], rows["B"], scalings).to(
            m
        )  # rounded alike, they start equal in 16 bits too
        nothing = norms == 0
        return m / norms.masked_fill(nothing, 1.0) + nothing

    @torch.no_grad()
    def norms(self, A: Tensor, B: Tensor, scalings: Sequence[float]) -> Tensor:
        """`‖W + s B A‖` of each row, (expert, d_out), on the device of A.

        In W's dtype, as PEFT has it: m comes from there too, so that on a base of 16 bits both are rounded alike.

        Args:
            A: (expert, rank, d_in).
            B: (expert, rank, d_out).
            scalings: of each expert.
        """
        assert self.base is not None
        weight = self.base.weight()
        compute = torch.promote_types(A.dtype, torch.float32)
        squares = self._squares_of(weight).to(device=A.device, dtype=compute)
        product = (A.flatten(0, 1).to(weight) @ weight.t()).to(A.device, compute).view_as(B)
        A, B = A.to(compute), B.to(compute)
        s = torch.tensor([*scalings], dtype=compute, device=A.device).unsqueeze(1)
        cross = einsum(B, product, "e rank d_out, e rank d_out -> e d_out")
        own = einsum(B, (A @ A.mT) @ B, "e rank d_out, e rank d_out -> e d_out")
        return (squares + 2 * s * cross + s.square() * own).clamp(min=0).sqrt().to(weight.dtype)

    def _squares_of(self, weight: Tensor) -> Tensor:
        """`‖W‖²` of each row, (d_out,), summed once for a weight that stays where it is."""
        assert self.base is not None
        key = None if torch.compiler.is_compiling() else self.base.stamp()
        if key is None or key not in self._squares:
            compute = torch.promote_types(weight.dtype, torch.float32)
            squares = weight.detach().to(compute).square().sum(dim=1)
            if key is None:
                return squares
            self._squares = {key: squares}
        return self._squares[key]

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        yield from Kind.problems(mixture)
        if mixture["combine"] == "factors":
            text = "'factors' goes with kinds that are their factors; dora scales the base's output too. Mix outputs."
            yield ("combine",), text
        if mixture["ffn_targets"]:
            yield (
                ("ffn_targets",),
                "does not go with kind: dora; use target_modules, which mix layer by layer.",
            )
        if "contrastive" in mixture["aux_losses"]:
            yield (
                ("aux_losses", "contrastive"),
                "compares the outputs of factors, which is not all that dora adds.",
            )

"""AdaLoRA: an expert is its singular values between two sets of vectors; training decides where values are worth keeping.

    ΔW = s · P Λ Q,  Λ diagonal and 0 at first, P and Q from N(0, 0.02²)

`r` is the rank at the start. All experts of all layers share one budget, which falls to `target_r` for each of them
(experts/rank_budget.py) within `total_step` steps, or those of the training where that is 0. `aux_losses: {orthonormal: 0.5}`
is the published penalty that keeps P and Q close to orthonormal.
The scaling stays α / r as values go, as in PEFT, whose r is larger by 1e-5.

Reference: AdaLoRA, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.config.section import Problem
from molora.experts.kinds.kind import About, Expert, Kind, StackSpec, Step
from molora.experts.rank_budget import RankBudget, Triplets


class AdaLora(Kind):
    """All banks of an adapter share one object of this class, and with it the budget. A is Q, B is Pᵀ, E is Λ."""

    about = About(
        "AdaLoRA, arXiv:2303.10512",
        "singular values and vectors of each expert, of which a falling budget keeps those that matter most",
        "when it is not known which layers and experts need rank; with aux_losses: {orthonormal: 0.5}",
    )
    settings: ClassVar[Mapping[str, int | float]] = {
        "target_r": 4, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "min_rank": 1,
        "total_step": 0,
    }  # fmt: skip
    starts_by_init = False
    orthonormal = True

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        super().__init__(share_A, **settings)
        chosen: Any = self.chosen
        self._budget = RankBudget(**chosen)

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

    def after_step(self, banks: Mapping[str, Any], at: Step) -> None:
        layers = {}
        for key, bank in banks.items():
            parameters = {name: stack.trainable for name, stack in bank.named_stacks().items()}
            if bank.trainable and all(p.requires_grad for p in parameters.values()):
                layers[key] = Triplets(parameters, [bank.ranks[i] for i in bank.trainable])
        if layers:
            self._budget.after_step(layers, at.number, at.total)

    def state(self) -> dict[str, Any]:
        return self._budget.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._budget.restore(state)

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        yield from Kind.problems(mixture)
        given = {**cls.settings, **mixture["kind_settings"]}
        for name in ("beta1", "beta2"):
            if isinstance(given[name], (int, float)) and not 0 < given[name] < 1:
                yield ("kind_settings", name), f"is {given[name]}; allowed: between 0 and 1."
        for name, least in (("target_r", 1), ("deltaT", 1), ("tinit", 0), ("tfinal", 0), ("min_rank", 0)):
            if isinstance(given[name], (int, float)) and given[name] < least:
                yield ("kind_settings", name), f"is {given[name]}; allowed: {least} or more."
        if isinstance(mixture["r"], int) and given["target_r"] > mixture["r"]:
            yield (
                ("kind_settings", "target_r"),
                f"is {given['target_r']}, but ranks start at r = {mixture['r']} and fall.",
            )
        if given["min_rank"] > given["target_r"]:
            yield (
                ("kind_settings", "min_rank"),
                f"is {given['min_rank']}, more than target_r = {given['target_r']}.",
            )


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

"""AdaLoRA: an expert is its singular values between two sets of vectors; training decides where values are worth keeping.

    ΔW = s · P Λ Q,  Λ diagonal and 0 at first, P and Q from N(0, 0.02²)

`r` is the rank at the start. All experts of all layers share one budget, which falls to `target_r` for each of them
(experts/rank_budget.py) within `total_step` steps, or those of the training where that is 0. `aux_losses: {orthonormal: 0.5}`
is the published penalty that keeps P and Q close to orthonormal.
The scaling stays α / r as values go, as in PEFT, whose r is larger by 1e-5.

Reference: AdaLoRA, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from molora.config.section import Problem
from molora.experts.kinds.kind import About, Kind, Step
from molora.experts.kinds.singular import Singular
from molora.experts.rank_budget import RankBudget, Triplets


class AdaLora(Singular):
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

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        super().__init__(share_A, **settings)
        chosen: Any = self.chosen
        self._budget = RankBudget(**chosen)

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
    def undone(cls, settings: Mapping[str, Any], steps: int) -> str | None:
        budget = RankBudget(**settings)
        last = budget.checked(budget.total_step or steps) - budget.tfinal
        if steps >= last:
            return None
        return (
            f"the budget reaches target_r = {budget.target_r} at step {last}: experts keep more. "
            "Lower kind_settings.total_step, or leave it out."
        )

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

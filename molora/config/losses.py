"""The auxiliary losses by name: what each may be set to, what it needs of a gate, and where its function is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from molora.config.choices import ENTROPIES
from molora.registry import Lazy, Registry

# A tuple of names, the first of which is the default; or the default of a number (None: one that the loss works out).
Option = tuple[str, ...] | float | None

MASK: dict[str, Option] = {"mask": ("padding", "response")}


@dataclass(frozen=True)
class LossSpec:
    """What the rules know of a loss. `function`: (`GateView`, settings) -> scalar; None for losses of the experts alone."""

    function: Lazy[Callable[..., Any]] | Callable[..., Any] | None = None
    settings: Mapping[str, Option] = field(default_factory=lambda: MASK)  # beside the coefficient
    of_gate: bool = True  # of a gate's answers, not of the experts alone
    by_task: bool = False  # it goes by each task's own experts
    of_probabilities: bool = False  # it needs a transform that gives probabilities
    select: str | None = None  # the one selection it goes with
    one_answer: str | None = None  # why it means nothing on a gate that gives everything the same weights

    def defaults(self) -> dict[str, Any]:
        """Its settings when none is given."""
        return {key: o[0] if isinstance(o, tuple) else o for key, o in self.settings.items()}

    def prepare(self) -> None:
        """Import its function now: a graph that is traced later cannot."""
        if self.function is not None:
            self.load()

    def load(self) -> Callable[..., Any]:
        """Its function."""
        assert self.function is not None
        return self.function.load() if isinstance(self.function, Lazy) else self.function


AUX_LOSSES: Registry[LossSpec] = Registry("loss")

_ALIKE = "it gives every token the same weights"
_SPECS = {
    "balance": LossSpec(of_probabilities=True),
    "importance": LossSpec(of_probabilities=True),
    "load": LossSpec(),
    "localized": LossSpec(settings={**MASK, "alpha": 0.8}, by_task=True, of_probabilities=True),
    "z": LossSpec(one_answer="softmax ignores a common shift of its logits"),
    "entropy": LossSpec(settings={**MASK, "index": 1.0, "form": tuple(ENTROPIES)}, of_probabilities=True),
    "margin": LossSpec(of_probabilities=True, select="threshold"),
    "mutual_information": LossSpec(
        settings={**MASK, "free_bits": None, "certain": 0.0, "even": 1.0},
        of_probabilities=True,
        one_answer=_ALIKE,
    ),
    "task_label": LossSpec(by_task=True),
    "similarity": LossSpec(of_probabilities=True, one_answer="it gives every sample the same weights"),
    "contrastive": LossSpec(settings={**MASK, "temperature": 0.1}, of_gate=False),
    "l1": LossSpec(),
    "expert_similarity": LossSpec(settings={"factor": ("A", "B", "both")}, of_gate=False),
    "orthonormal": LossSpec(settings={}, of_gate=False),
    "orthogonal": LossSpec(settings={"norm": ("l1", "squared")}, of_gate=False),
}
for _name, _spec in _SPECS.items():
    _where = Lazy[Callable[..., Any]](f"forward.gate_losses:{_name}")
    AUX_LOSSES.add(_name, replace(_spec, function=_where) if _spec.of_gate else _spec)

"""What training minimises: the section `train.objective`, and the objectives there are by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from molora.config.section import NonNegative, Positive, Problem, Section, expand_shorthand, refuse
from molora.config.suggest import options
from molora.registry import Lazy, Registry

OBJECTIVES: Registry[Any] = Registry("objective")
OBJECTIVES.add("supervised", Lazy("training.objective:Supervised"))
OBJECTIVES.add("dpo", Lazy("training.preferences:Preferences"))
OBJECTIVES.add("orpo", Lazy("training.reference_free:Orpo"))
OBJECTIVES.add("simpo", Lazy("training.reference_free:SimPo"))

# Which kinds each setting acts with.
_ACTS_WITH = {
    "loss": ("dpo",), "beta": ("dpo", "orpo", "simpo"), "label_smoothing": ("dpo",), "margin": ("simpo",),
}  # fmt: skip

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class ObjectiveConfig(Section):
    """What is minimised. `objective: dpo` is short for `objective: {kind: dpo}`."""

    kind: str = "supervised"
    """`supervised`: the targets' own loss. Prefer `target` to `rejected`: `dpo`, from the model as it was; `orpo`, `simpo`."""
    loss: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"] = "sigmoid"
    """Of dpo: TRL's names. `sigmoid_norm` and `ipo` compare means per token, the others sums."""
    beta: Positive = 0.1
    """Of dpo: how firmly it is held to the model as it was before; of ipo: its τ; of orpo and simpo: their β."""
    label_smoothing: Smoothing = 0.0
    """Of dpo, loss sigmoid or robust: the share of pairs that are taken to be the wrong way round."""

    margin: NonNegative = 0.5
    """Of simpo: by how much the better answer is to win; its γ."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return expand_shorthand(data, "kind")

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.kind not in OBJECTIVES:
            yield ("kind",), f"{self.kind!r} is no objective.{options(self.kind, list(OBJECTIVES))}"
        for key, kinds in _ACTS_WITH.items():
            strange = self.kind in ("supervised", "dpo", "orpo", "simpo") and self.kind not in kinds
            if strange and getattr(self, key) != type(self).model_fields[key].default:
                yield (key,), f"acts only with kind: {', '.join(kinds)}."
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            yield ("label_smoothing",), f"acts with loss: sigmoid or robust, not with {self.loss}."

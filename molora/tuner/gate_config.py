"""GateConfig: the axes of a gate, and the shorthand kinds that expand to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from molora.config.kinds import GATE_CHOICES, GATE_KINDS
from molora.config.suggest import did_you_mean
from molora.errors import ConfigError


@dataclass
class GateConfig:
    """Who decides the weights: the gate's axes. Defaults: token-wise top-2 softmax, shared per group.

    Args:
        scope: what the gate reads: `token`, `task` (hard by task id) or `constant` (nothing; learned).
        share: one gate per `linear`, per `group` of linears that read the same input, or `global`
            (task and constant scopes).
        score: `linear` for token scope, `table` for constant, `none` for task.
        transform: `softmax`, or `identity` for task scope.
        select: `dense`, `top_k`, or `hard` for task scope.
        top_k: experts per token under `top_k`.
        renorm: `none` or `sum`; None means `sum` for top_k > 1 and `none` otherwise.
        temperature: divides the logits.
        noise: `gaussian` adds N(0, noise_std²) to the logits, in training only.
        noise_std: its standard deviation.
        init_std: standard deviation of the initial rows of a linear score.
    """

    scope: str = "token"
    share: str = "group"
    score: str = "linear"
    transform: str = "softmax"
    select: str = "top_k"
    top_k: int = 2
    renorm: str | None = None
    temperature: float = 1.0
    noise: str | None = None
    noise_std: float = 1.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name, allowed in GATE_CHOICES.items():
            value = getattr(self, name, None)
            if value is not None and value not in allowed:
                raise ConfigError(
                    f"gate.{name}={value!r} is not one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
                )
        expected = {"task": GATE_KINDS["task"], "constant": GATE_KINDS["constant"]}.get(
            self.scope, {"score": "linear"}
        )
        if self.scope == "task":  # one meaning only: the long fields follow from the scope
            self.score, self.transform, self.select = "none", "identity", "hard"
        if self.scope == "constant" and self.score == "linear":
            self.score = "table"
        if self.score != expected["score"]:
            raise ConfigError(
                f"gate.score={self.score!r} does not go with gate.scope={self.scope!r}; use {expected['score']!r}."
            )
        if self.scope != "task" and (self.transform != "softmax" or self.select == "hard"):
            raise ConfigError(
                f"gate.transform={self.transform!r} with gate.select={self.select!r} needs gate.scope='task'.",
                hint="learned gates use transform='softmax' and select='dense' or 'top_k'.",
            )
        if self.share == "global" and self.scope == "token":
            raise ConfigError(
                "gate.share='global' needs scope 'task' or 'constant': linears with different inputs cannot share a token gate.",
                hint="use share='group' or share='linear'.",
            )
        if self.top_k < 1 or self.temperature <= 0 or self.noise_std < 0 or self.init_std < 0:
            raise ConfigError(
                "gate: top_k must be at least 1, temperature positive, noise_std and init_std not negative."
            )
        if self.renorm == "sum" and self.select == "dense":
            raise ConfigError(
                "gate.renorm='sum' needs gate.select='top_k': dense softmax weights already sum to 1."
            )

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters."""
        return self.scope != "task"


def gate_from_kind(kind: str, **settings: Any) -> GateConfig:
    """A GateConfig from the shorthand `soft`, `top_k`, `task` or `constant` plus the fields it leaves open."""
    if kind not in GATE_KINDS:
        raise ConfigError(
            f"gate.kind={kind!r} is not one of {', '.join(GATE_KINDS)}.{did_you_mean(kind, GATE_KINDS)}"
        )
    return GateConfig(**{**GATE_KINDS[kind], **settings})

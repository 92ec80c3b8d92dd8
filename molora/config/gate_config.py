"""GateConfig: a gate as Python describes it, checked when made; and the shorthand kinds that expand to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from molora.config.choices import GATE_KINDS
from molora.config.gate import GateSettings
from molora.config.gate_rules import gate_problems
from molora.config.setting import documented
from molora.config.suggest import not_one_of
from molora.errors import ConfigError


@documented
@dataclass
class GateConfig(GateSettings):
    """Who decides the weights: the gate's axes. Defaults: token-wise top-2 softmax, shared per group.

    Raises:
        ConfigError: settings that make no sense together, with what does.
    """

    def __post_init__(self) -> None:
        if self.scope == "task" and self.score in ("linear", "none"):
            # one meaning only: the long fields follow from the scope
            self.score, self.transform, self.select = "none", "identity", "hard"
        if self.scope == "constant" and self.score == "linear":
            self.score = "table"
        for field, message in gate_problems(self):
            raise ConfigError(f"gate.{field}={getattr(self, field)!r}: {message}")


def gate_from_kind(kind: str, **settings: Any) -> GateConfig:
    """A GateConfig from a shorthand of `GATE_KINDS` plus the fields it leaves open."""
    if kind not in GATE_KINDS:
        raise ConfigError(f"gate.kind={not_one_of(kind, GATE_KINDS)}")
    return GateConfig(**{**GATE_KINDS[kind], **settings})

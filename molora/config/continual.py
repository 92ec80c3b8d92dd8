"""The `continual` section: tasks one after another, how the old ones are kept, and who names a sample's task."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from molora.config.section import (
    NonNegative,
    PositiveInt,
    Section,
    TaskName,
    expand_shorthand,
    refuse,
    without_default,
)
from molora.config.suggest import did_you_mean

# What each strategy takes beside `kind`, with its defaults.
STRATEGIES: dict[str, dict[str, Any]] = {
    "sequential": {},
    "independent": {},
    "inc_lora": {},
    "replay": {"ratio": 0.02, "count": None},
    "joint": {},
    "o_lora": {"coefficient": 0.5, "norm": "l1", "factor": "A", "l2": 0.0},
    "n_lora": {"coefficient": 0.4},
    "inf_lora": {"energy": 0.98, "energy_end": 1.0},
    "slao": {},
    "ella": {"coefficient": 5e6},
    "gated": {"energy": 0.995},
    "color": {},
}

ONE_EXPERT = ["sequential", "replay", "joint", "slao"]
"""Strategies in which all tasks train the same experts."""

TASK_BY_TASK = frozenset(STRATEGIES) - {"replay", "joint"}
"""Strategies that train on the present task's records alone."""

# Gates that strategies bring where the recipe's adapter says nothing of one.
SUM = {"kind": "constant", "share": "global", "transform": "identity", "start": 1.0}
BY_TASK = {"kind": "task", "share": "global"}
GATED = {"kind": "sequence", "score": "cosine", "transform": "gain"}
GATES: dict[str, dict[str, Any] | str] = {
    kind: {"independent": BY_TASK, "color": BY_TASK, "gated": GATED}.get(kind, SUM) for kind in STRATEGIES
}


WITHOUT_MEMORY = ["inc_lora", "o_lora", "n_lora", "ella"]
"""Strategies that need nothing of earlier tasks but their experts, so that any trained run can go on with them."""


# What a strategy cannot do without in a gate that the recipe gives instead of its own.
NEEDED_GATE: dict[str, dict[str, Any]] = {
    "independent": {"scope": "task"},
    "color": {"scope": "task"},
    "gated": {"scope": "sequence", "score": "cosine", "transform": "gain", "norm": "unit"},
    "inf_lora": {"scope": "constant", "transform": "identity"},
    "slao": {"scope": "constant", "transform": "identity"},
}


class StrategyConfig(Section):
    """A strategy by name, with its own settings. `strategy: name` is short for `strategy: {kind: name}`."""

    kind: str
    ratio: float | None = Field(default=None, gt=0, le=1)
    count: PositiveInt | None = None
    coefficient: NonNegative | None = None
    norm: Literal["l1", "squared"] | None = None
    factor: Literal["A", "B", "both"] | None = None
    l2: NonNegative | None = None
    energy: float | None = Field(default=None, gt=0, le=1)
    energy_end: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        data = expand_shorthand(data, "kind")
        if not isinstance(data, dict) or "kind" not in data:
            return data
        kind = data["kind"]
        if not isinstance(kind, str) or kind not in STRATEGIES:
            allowed = ", ".join(STRATEGIES)
            refuse(
                [
                    (
                        ("kind",),
                        f"{kind!r} is no strategy.{did_you_mean(str(kind), STRATEGIES)} Allowed: {allowed}.",
                    )
                ]
            )
        own = STRATEGIES[kind]
        settings = ", ".join(own) or "none"
        refuse(
            [
                (
                    (key,),
                    f"not a setting of strategy {kind!r}.{did_you_mean(key, own)} Its settings: {settings}.",
                )
                for key, value in data.items()
                if key != "kind" and key not in own and value is not None
            ]
        )
        if data.get("count") is not None and "ratio" in own:
            own = {**own, "ratio": None}
        return {**own, **{key: value for key, value in data.items() if value is not None}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ratio is not None and self.count is not None:
            refuse([(("count",), "ratio is given too; write only one.")])
        return self


class RouterConfig(Section):
    """Who names the task of a sample that comes without an id: the nearest of some prototypes per task.

    Features are the base's hidden states at this share of its `depth`, averaged over the prompt; as CoLoR publishes it:
    `{clusters: 5, metric: euclidean, depth: 1}`.
    """

    kind: Literal["prototypes"] = "prototypes"
    clusters: PositiveInt = 20
    metric: Literal["covariance", "euclidean"] = "covariance"
    depth: float = Field(default=0.67, ge=0, le=1)
    records: PositiveInt = 2000

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return expand_shorthand(data, "kind")


class ContinualConfig(Section):
    """Training on tasks one after another. Each has `train.max_steps` (or epochs) of its own."""

    strategy: StrategyConfig = Field(default_factory=lambda: StrategyConfig(kind="color"))
    order: list[TaskName] | None = None
    router: RouterConfig | None = None
    softmax: Literal["own", "seen", "all"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _router_of_color(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return without_default(data, "router", "prototypes") if strategy_kind(data) == "color" else data


def strategy_kind(section: Any) -> str | None:
    """The strategy that a `continual` section as written names; None where it is malformed."""
    strategy = section.get("strategy", "color") if isinstance(section, dict) else None
    kind = strategy.get("kind") if isinstance(strategy, dict) else strategy
    return kind if isinstance(kind, str) else None

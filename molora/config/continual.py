"""The `continual` section: tasks one after another, how the old ones are kept, and who names a sample's task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from molora.config.adapter import RouterSection
from molora.config.section import (
    NonNegative,
    PositiveInt,
    Section,
    TaskName,
    expand_shorthand,
    refuse,
    without_default,
)
from molora.config.suggest import options
from molora.registry import Lazy, Registry

# Gates that strategies bring along.
SUM = {"kind": "constant", "share": "global", "transform": "identity", "start": 1.0}
BY_TASK = {"kind": "task", "share": "global"}
GATED = {"kind": "sequence", "score": "cosine", "transform": "gain"}

# What some cannot do without in a gate that the recipe gives instead.
_SUMMED = {"scope": "constant", "transform": "identity"}
_ONLY_BY_TASK = {"scope": "task"}
_BY_COSINE = {"scope": "sequence", "score": "cosine", "transform": "gain", "norm": "unit"}


@dataclass(frozen=True)
class StrategySpec:
    """All that is known of a strategy before it runs. `strategy`: a subclass of `molora.continual.strategy.Strategy`.

    `settings`: what it takes beside `kind`, with defaults: some of the fields of `StrategyConfig`.
    """

    strategy: type | Lazy[type]
    settings: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] | str = field(default_factory=lambda: SUM)  # where the adapter names none
    needs: Mapping[str, Any] = field(default_factory=dict)  # of a gate that the recipe gives instead
    router: str | None = None  # where the recipe names none
    one_expert: bool = False  # all tasks train the same experts; else each adds one and the others are frozen
    without_memory: bool = False  # it needs only the experts of earlier tasks, so any run can go on
    task_by_task: bool = True  # it trains on the present task's records alone
    at_once: bool = False  # all tasks are learned in one turn

    def load(self) -> type:
        """The class."""
        return self.strategy.load() if isinstance(self.strategy, Lazy) else self.strategy


STRATEGIES: Registry[StrategySpec] = Registry("strategy")


def _at(where: str) -> Lazy[type]:
    return Lazy(f"continual.{where}")


_PLAIN = _at("strategy:Strategy")
_REPLAY = {"ratio": 0.02, "count": None}
_O_LORA = {"coefficient": 0.5, "norm": "l1", "factor": "A", "l2": 0.0}

for _name, _spec in {
    "sequential": StrategySpec(_PLAIN, one_expert=True),
    "independent": StrategySpec(_PLAIN, gate=BY_TASK, needs=_ONLY_BY_TASK),
    "inc_lora": StrategySpec(_PLAIN, without_memory=True),
    "replay": StrategySpec(_at("replay:Replay"), _REPLAY, one_expert=True, task_by_task=False),
    "joint": StrategySpec(_at("replay:Joint"), one_expert=True, task_by_task=False, at_once=True),
    "o_lora": StrategySpec(_at("penalties:OLoRA"), _O_LORA, without_memory=True),
    "n_lora": StrategySpec(_at("penalties:NLoRA"), {"coefficient": 0.4}, without_memory=True),
    "inf_lora": StrategySpec(_at("inf_lora:InfLoRA"), {"energy": 0.98, "energy_end": 1.0}, needs=_SUMMED),
    "slao": StrategySpec(_at("slao:Slao"), needs=_SUMMED, one_expert=True),
    "ella": StrategySpec(_at("penalties:Ella"), {"coefficient": 5e6}, without_memory=True),
    "gated": StrategySpec(
        _at("gated:Gated"), {"energy": 0.995, "energy_end": None}, gate=GATED, needs=_BY_COSINE
    ),
    "color": StrategySpec(_PLAIN, gate=BY_TASK, needs=_ONLY_BY_TASK, router="gaussian"),
}.items():
    STRATEGIES.add(_name, _spec)


class StrategyConfig(Section):
    """A strategy by name, with its own settings. `strategy: name` is short for `strategy: {kind: name}`."""

    kind: str
    """Its name."""
    ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of each old task's records that is replayed."""
    count: PositiveInt | None = None
    """How many records of each old task are replayed, instead of `ratio`."""
    coefficient: NonNegative | None = None
    """Of the penalty."""
    norm: Literal["l1", "squared"] | None = None
    """Of the overlap that is penalised."""
    factor: Literal["A", "B", "both"] | None = None
    """The factors whose overlap is penalised."""
    l2: NonNegative | None = None
    """Coefficient of the new factors' squared norm."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Share of the energy of a task's inputs whose directions are closed to later experts."""
    energy_end: float | None = Field(default=None, gt=0, le=1)
    """What it rises to over the sequence; null: it stays."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        data = expand_shorthand(data, "kind")
        if not isinstance(data, dict) or "kind" not in data:
            return data
        kind = data["kind"]
        if kind not in STRATEGIES:
            refuse([(("kind",), f"{kind!r} is no strategy.{options(kind, STRATEGIES)}")])
        own, given = STRATEGIES[kind].settings, {k: v for k, v in data.items() if v is not None}
        text, strange = f"not a setting of strategy {kind!r}.", [k for k in given if k not in ("kind", *own)]
        refuse(((key,), text + options(key, own, "Its settings")) for key in strange)
        if "count" in given and "ratio" in own:
            own = {**own, "ratio": None}
        return {**own, **given}

    @property
    def spec(self) -> StrategySpec:
        """What is known of the strategy."""
        return STRATEGIES[self.kind]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ratio is not None and self.count is not None:
            refuse([(("count",), "ratio is given too; write only one.")])
        return self


class PrototypesConfig(Section):
    """Prototypes that a sequence keeps in its run, not in its adapter: who names tasks in earlier runs.

    Features are the base's hidden states at this share of its `depth`, averaged over the prompt.
    """

    kind: Literal["prototypes"] = "prototypes"
    """Centres of each task's features."""
    clusters: PositiveInt = 20
    """Centres for each task."""
    metric: Literal["covariance", "euclidean"] = "covariance"
    """How distances are measured."""
    depth: float = Field(default=0.67, ge=0, le=1)
    """The block read, as a share of the depth."""
    records: PositiveInt = 2000
    """Prompts of each task that are read at most."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return expand_shorthand(data, "kind")


class ContinualConfig(Section):
    """Training on tasks one after another. Each has `train.max_steps` (or epochs) of its own."""

    strategy: StrategyConfig = Field(default_factory=lambda: StrategyConfig(kind="color"))
    """How old tasks are kept while a new one is learned."""
    order: list[TaskName] | None = None
    """The tasks' order; as in `data.tasks` where left out."""
    router: RouterSection | None = None
    """Who names tasks of prompts without an id; the strategy's, where neither this nor `adapter.router` is given."""
    prototypes: PrototypesConfig | None = None
    """As earlier runs have it; use `router`."""
    softmax: Literal["own", "seen", "all"] | None = None
    """Whose labels compete under `head: match`: the task's own, those seen so far, or all."""

    @model_validator(mode="before")
    @classmethod
    def _router_of_the_strategy(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        router = data.get("router")
        if isinstance(router, dict) and "metric" in router:  # as earlier runs have it
            return {**data, "router": None, "prototypes": router}
        if isinstance(router, dict) and "clusters" in router:
            return {**data, "router": {"kind": "prototypes", **router}}
        spec: StrategySpec | None = STRATEGIES.get(strategy_kind(data) or "")
        own = spec.router if spec is not None and data.get("prototypes") is None else None
        return without_default(data, "router", own) if own else data


def strategy_kind(section: Any) -> str | None:
    """The strategy that a `continual` section as written names; None where it is malformed."""
    strategy = section.get("strategy", "color") if isinstance(section, dict) else None
    kind = strategy.get("kind") if isinstance(strategy, dict) else strategy
    return kind if isinstance(kind, str) else None

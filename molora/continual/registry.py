"""Strategies by the name a recipe gives them, and how users add their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molora.config.adapter import AdapterConfig
from molora.config.continual import STRATEGIES, SUM, StrategyConfig, StrategySpec
from molora.config.load import load_section
from molora.continual.strategy import Strategy
from molora.errors import ConfigError


def build_strategy(settings: StrategyConfig) -> Strategy:
    """The strategy of a recipe."""
    made: Strategy = settings.spec.load()(settings)
    return made


def register_strategy(
    name: str,
    strategy: type[Strategy],
    *,
    settings: Mapping[str, Any] | None = None,
    gate: Mapping[str, Any] | str | None = None,
    one_expert: bool = False,
    without_memory: bool = False,
) -> None:
    """Make `continual: {strategy: name}` mean a strategy of your own, in this process.

    Register it before reading a recipe, or a run that was made with it.

    Args:
        strategy: a subclass of `molora.continual.strategy.Strategy`.
        settings: what it takes beside `kind`, with defaults: some of the fields of `StrategyConfig`.
        gate: the gate it brings, as in a recipe's `adapter.gate`. None: experts add up.
        one_expert: whether all tasks train the same experts; else each task adds one and freezes the others.
        without_memory: whether it needs nothing of earlier tasks but their experts, so that `add_expert` takes it too.

    Raises:
        ConfigError: the name is taken or no name; the class is no strategy; wrong settings, or a wrong gate.
    """
    if not (isinstance(strategy, type) and issubclass(strategy, Strategy)):
        raise ConfigError(f"{strategy!r} is no subclass of molora.continual.strategy.Strategy.")
    known = [field for field in StrategyConfig.model_fields if field != "kind"]
    for key in settings or {}:
        if key not in known:
            raise ConfigError(f"{key!r} is no setting of strategies. Allowed: {', '.join(known)}.")
    spec = StrategySpec(
        strategy,
        settings=dict(settings or {}),
        gate=SUM if gate is None else gate if isinstance(gate, str) else dict(gate),
        one_expert=one_expert,
        without_memory=without_memory,
        task_by_task=strategy.training_tasks is Strategy.training_tasks,
    )
    load_section(AdapterConfig, {"num_experts": 1, "gate": spec.gate})
    STRATEGIES.add(name, spec, source=strategy.__module__)
    try:
        load_section(StrategyConfig, {"kind": name})
    except ConfigError:
        STRATEGIES.remove(name)
        raise

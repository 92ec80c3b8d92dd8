"""Recipes: their schema, their strict YAML form, and what is wrong with them. Imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.config.adapter import AdapterConfig, GateSection
    from molora.config.data import DataConfig, TaskConfig
    from molora.config.evaluation import EvalConfig
    from molora.config.grow import GrowConfig, load_grow
    from molora.config.load import dump_recipe, load_recipe
    from molora.config.run import BaseConfig, RunConfig
    from molora.config.train import StageConfig, TrainConfig

_HOMES = {
    "adapter": ("AdapterConfig", "GateSection"),
    "data": ("DataConfig", "TaskConfig"),
    "grow": ("GrowConfig", "load_grow"),
    "load": ("dump_recipe", "load_recipe"),
    "evaluation": ("EvalConfig",),
    "run": ("BaseConfig", "RunConfig"),
    "train": ("StageConfig", "TrainConfig"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterConfig", "BaseConfig", "DataConfig", "EvalConfig", "GateSection", "GrowConfig", "RunConfig", "StageConfig",
    "TaskConfig", "TrainConfig", "dump_recipe", "load_grow", "load_recipe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazy, so that the pure-data modules (kinds, names, suggest) stay importable without pydantic's start-up.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

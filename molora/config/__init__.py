"""Recipes: their schema, their strict YAML form, and what is wrong with them. Imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.config.adapter import AdapterConfig, GateSection
    from molora.config.data import DataConfig, TaskConfig
    from molora.config.grow import GrowConfig, load_grow
    from molora.config.load import dump_recipe, load_recipe
    from molora.config.run import BaseConfig, EvalConfig, RunConfig
    from molora.config.train import StageConfig, TrainConfig

_HOME = {
    "AdapterConfig": "adapter",
    "GateSection": "adapter",
    "DataConfig": "data",
    "TaskConfig": "data",
    "GrowConfig": "grow",
    "load_grow": "grow",
    "dump_recipe": "load",
    "load_recipe": "load",
    "BaseConfig": "run",
    "EvalConfig": "run",
    "RunConfig": "run",
    "StageConfig": "train",
    "TrainConfig": "train",
}

__all__ = [
    "AdapterConfig",
    "BaseConfig",
    "DataConfig",
    "EvalConfig",
    "GateSection",
    "GrowConfig",
    "RunConfig",
    "StageConfig",
    "TaskConfig",
    "TrainConfig",
    "dump_recipe",
    "load_grow",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that the pure-data modules (kinds, names, suggest) stay importable without pydantic's start-up.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

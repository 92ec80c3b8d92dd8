"""Scores that users register by name, so that a config can name them and an adapter can be saved with them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from molora.config.choices import GATE_CHOICES
from molora.config.names import check_name
from molora.errors import ConfigError

ScoreFactory = Callable[[int, int], nn.Module]

SCORES: dict[str, ScoreFactory] = {}


def register_score(name: str, factory: ScoreFactory) -> None:
    """Make `GateConfig(score=name)` mean a score of your own, in Python and in recipes.

    Args:
        name: a new name.
        factory: (d_in, num_experts) -> a module that maps what the gate reads, (tokens, d_in), to logits (tokens,
            expert), both float32 or better; row by row, or batches would depend on who is in them. Its parameters
            are saved with the adapter. Register it under the same name before loading that.

    Raises:
        ConfigError: the name is taken, or is no name.
    """
    check_name(name, "score")
    if name in GATE_CHOICES["score"]:
        raise ConfigError(f"there is a score {name!r} already.")
    SCORES[name] = factory
    GATE_CHOICES["score"] = (*GATE_CHOICES["score"], name)

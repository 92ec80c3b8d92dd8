"""Growth: when experts get more ranks, and how many growths a checkpoint has behind it.

A growth belongs to the start of the step after it, so a checkpoint of the step before has the smaller ranks, whether it is the
last of its run or not.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from molora.config.train import RankGrowthConfig
from molora.errors import ConfigError
from molora.tuner.ranks import carry_over, ranks_of, set_ranks


class Growth:
    """The growths of one training, and how many there were."""

    def __init__(self, settings: RankGrowthConfig) -> None:
        self.settings = settings
        self.done = 0

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError where experts cannot grow, or none is small enough to."""
        ranks = ranks_of(model)
        if not self.done and not any(rank < self.settings.max for rank in ranks.values()):
            raise ConfigError(
                f"train.rank_growth.max is {self.settings.max}, and no expert that learns has a smaller rank.",
                hint="raise it, or leave train.rank_growth out.",
            )

    def due(self, model: nn.Module, step: int, optimizer: Optimizer) -> None:
        """Let the experts grow for so many steps behind them, and the optimiser go on with what they became."""
        while self.done < step // self.settings.every:
            self.done += 1
            found = {
                name: min(rank + self.settings.by, self.settings.max)
                for name, rank in ranks_of(model).items()
                if rank < self.settings.max
            }
            carry_over(optimizer, set_ranks(model, found))

    def state(self, model: nn.Module) -> dict[str, Any]:
        """Plain data that a checkpoint keeps."""
        return {"done": self.done, "ranks": ranks_of(model)}

    def restore(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Go on from `state`: the model gets the ranks that the checkpoint's weights have."""
        self.done = state["done"]
        set_ranks(model, state["ranks"])

"""Strategies by the name a recipe gives them."""

from __future__ import annotations

from molora.config.continual import StrategyConfig
from molora.continual.gated import Gated
from molora.continual.inf_lora import InfLoRA
from molora.continual.penalties import Ella, NLoRA, OLoRA
from molora.continual.replay import Joint, Replay
from molora.continual.slao import Slao
from molora.continual.strategy import Strategy

KINDS: dict[str, type[Strategy]] = {
    "sequential": Strategy,
    "independent": Strategy,
    "inc_lora": Strategy,
    "replay": Replay,
    "joint": Joint,
    "o_lora": OLoRA,
    "n_lora": NLoRA,
    "inf_lora": InfLoRA,
    "slao": Slao,
    "ella": Ella,
    "gated": Gated,
    "color": Strategy,
}


def build_strategy(settings: StrategyConfig) -> Strategy:
    """The strategy of a recipe."""
    return KINDS[settings.kind](settings)

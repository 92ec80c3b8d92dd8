"""Which mixtures can have ranks that grow in training."""

from __future__ import annotations

from collections.abc import Iterator

from molora.config.adapter import AdapterConfig
from molora.config.choices import KINDS
from molora.config.section import Problem
from molora.config.train import RankGrowthConfig


def growth_problems(
    growth: RankGrowthConfig | None, adapter: AdapterConfig, *, alone: bool
) -> Iterator[Problem]:
    """What of a recipe does not go with `train.rank_growth`; `alone`: it is one training, of all tasks at once."""
    if growth is None:
        return
    where = ("train", "rank_growth")
    if not alone:
        text = "does not go with several trainings, of tasks one after another or of federated rounds"
        yield where, f"{text}; use molora train, or molora add-expert."
    if adapter.share_A or not KINDS[adapter.kind].grows:
        allowed = ", ".join(name for name in KINDS if KINDS[name].grows)
        yield where, f"goes with experts that have an A of their own (share_A: false), of kind {allowed}."
    if not isinstance(adapter.r, int) or adapter.rank_pattern or adapter.alpha_pattern:
        yield where, "starts from one rank and one alpha: give adapter.r as a number, without patterns."
    elif growth.max <= adapter.r and adapter.from_loras is None:
        yield (*where, "max"), f"is {growth.max}, and adapter.r is {adapter.r} already."

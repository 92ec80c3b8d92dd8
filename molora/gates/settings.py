"""GateSettings: the fields of GateConfig a gate reads."""

from __future__ import annotations

from typing import Protocol


class GateSettings(Protocol):
    """The axes of a gate, see GateConfig."""

    scope: str
    pool: str
    blend: str
    score: str
    bias: bool
    hidden: int
    norm: str
    absolute: bool
    embedding_dim: int
    splits: int
    transform: str
    select: str
    top_p: float
    min_k: int
    threshold: float | None
    threshold_learned: bool
    entropy_threshold: float
    entropy_index: float
    renorm: str | None
    balance_rate: float
    temperature: float
    noise: str | None
    noise_std: float
    init_std: float
    start: float

    @property
    def alone_is_one(self) -> bool: ...

    @property
    def by_sample(self) -> bool: ...

"""The `eval` section: how a trained adapter is scored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from molora.config.section import ExpertCount, PositiveInt, Section, refuse

Mode = Literal["gate", "task", "base"]
MODES: tuple[Mode, ...] = ("gate", "task", "base")


class SamplingConfig(Section):
    """How answers are drawn for tasks of metric `pass_at_k`."""

    samples: int = Field(default=10, ge=1, le=10**4)
    """Answers to each record."""
    k: PositiveInt = 1
    """The score is the chance that one of so many is right."""
    temperature: float = Field(default=0.8, ge=0.01, le=1e4)
    """Below 1, likely tokens become likelier."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Tokens are drawn from the likeliest that together have this probability."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Seconds after which the check of an answer counts as failed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k > self.samples:
            refuse([(("k",), f"is more than samples = {self.samples}; draw more, or lower it.")])
        return self


class EvalConfig(Section):
    """How the trained adapter is scored after training and by `molora eval`."""

    batch_size: PositiveInt = 32
    """Records scored at once."""
    max_new_tokens: PositiveInt = 32
    """Longest answer in tokens."""
    num_beams: ExpertCount = 1
    """Beams; 1 is greedy."""
    sampling: SamplingConfig | None = None
    """How answers are drawn for tasks of metric `pass_at_k`; null: as its defaults say."""
    modes: list[Mode] = Field(default_factory=lambda: list(MODES), min_length=1)
    """Score with the gate deciding, with each task's own experts by id, and with the base alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(
            (("modes", i), f"{mode!r} is there twice.")
            for i, mode in enumerate(self.modes)
            if mode in self.modes[:i]
        )
        return self

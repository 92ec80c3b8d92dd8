"""The `train` section: steps, batches, learning rates, precision, stages and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from molora.config.objective import ObjectiveConfig
from molora.config.section import (
    NonNegative,
    Positive,
    PositiveInt,
    Problem,
    Section,
    Width,
    refuse,
    without_default,
)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
Part = Literal["experts", "gates", "heads"]


class StageConfig(Section):
    """A part of training in which only some parameters learn; the last stage runs until the end."""

    steps: PositiveInt | None = None
    """Optimiser steps of this stage; the last one has none."""
    train: list[Part] = Field(min_length=1)
    """What learns in it: experts, gates, heads."""


class RankGrowthConfig(Section):
    """Ranks that grow while experts learn: what the experts add stays what it was at each growth, and so does the optimiser."""

    every: PositiveInt
    """Optimiser steps from one growth to the next."""
    by: PositiveInt = 4
    """How many ranks each expert that learns gets at a time."""
    max: Width
    """The rank at which an expert stops to grow."""


class TrainConfig(Section):
    """How the adapter is trained."""

    max_steps: PositiveInt | None = None
    """Optimiser steps. Without it and without `epochs`: one epoch."""
    epochs: PositiveInt | None = None
    """Passes over the training records instead of `max_steps`."""
    batch_size: PositiveInt = 16
    """Records in a forward, on each device."""
    accumulate: PositiveInt = 1
    """Batches whose gradients make one optimiser step."""
    lr: Positive = 1e-3
    """Largest learning rate of the experts (AdamW)."""
    gate_lr: Positive | None = None
    """That of the gates, where it differs."""
    prompt_lr: Positive | None = None
    """That of the experts' virtual tokens, where it differs; vectors before the text often want a higher one."""
    head_lr: Positive | None = None
    """That of classification heads and `modules_to_save`, where it differs."""
    lora_plus_ratio: Positive = 1.0
    """How many times larger the learning rate of B is than that of A (LoRA+)."""
    weight_decay: NonNegative = 0.0
    """Of experts and heads."""
    gate_weight_decay: NonNegative = 0.0
    """Of gates."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: int | float = 0.05
    """Steps in which the learning rate rises: a share of all below 1, or a whole number."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """What is minimised."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; null: any."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Of the computation. Experts and gates are kept in float32 in all three."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Parts of training in which only some parameters learn."""
    rank_growth: RankGrowthConfig | None = None
    """Ranks that grow while experts learn, from `adapter.r` on."""
    val_every: PositiveInt | None = None
    """Steps from one validation loss to the next; null: none."""
    patience: PositiveInt | None = None
    """Validations without a better loss after which training ends."""
    save_every: PositiveInt | None = None
    """Steps from one checkpoint to the next; null: one at the end, and one when interrupted."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    log_every: PositiveInt = 10
    """Steps from one line of metrics to the next."""
    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] | None = None
    """Who keeps the metrics beside `metrics.csv`, which is always written; null: tensorboard where it is installed."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """At a loss that is not finite: stop with exit code 5, or go back to before the batch and leave it out."""
    devices: PositiveInt | list[int] | Literal["auto"] = 1
    """How many, or which, or all there are."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Which kind of device."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several devices work together."""

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, data: Any) -> Any:
        """Without max_steps and epochs: one epoch."""
        if isinstance(data, dict) and data.get("max_steps") is None:
            return without_default(data, "epochs", 1)
        return data

    @field_validator("precision", mode="before")
    @classmethod
    def _no_half_weights(cls, value: Any) -> Any:
        """Weights of 16 bits make experts and gates 16 bits too: fp16 gives NaN from the second step."""
        if value in ("16-true", "bf16-true", "16", "bf16", 16):
            text = (
                f"{value!r} would keep the experts and gates themselves in 16 bits, which does not train. "
                f"Allowed: {', '.join(PRECISIONS)}. A frozen base of 16 bits is base.dtype: bfloat16."
            )
            raise PydanticCustomError("precision", "{text}", {"text": text})
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.max_steps is not None and self.epochs is not None:
            yield ("epochs",), "max_steps is given too; write only one (the other may be null)."
        if not self.warmup >= 0 or (isinstance(self.warmup, float) and self.warmup >= 1):  # NaN is not
            yield ("warmup",), f"{self.warmup} is neither a fraction below 1 nor a whole number of steps."
        if self.on_nonfinite == "rollback" and self.devices not in (1, [0]):
            yield ("on_nonfinite",), "'rollback' goes with one device; use stop, and --resume."
        if self.rank_growth is not None and self.devices not in (1, [0]):
            yield ("rank_growth",), "goes with one device, whose gradients nobody has to be told of anew."
        if self.loggers is not None and len(set(self.loggers)) < len(self.loggers):
            yield ("loggers",), "names a logger twice."
        if self.patience is not None and self.val_every is None:
            yield ("patience",), "counts validations, and val_every is not set; set val_every."
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            if stage.steps is None and not last:
                yield ("stages", i), "needs `steps`; only the last stage runs until the end."
            if stage.steps is not None and last:
                yield ("stages", i, "steps"), "the last stage runs until the end; leave its steps out."
            if len(set(stage.train)) != len(stage.train):
                yield ("stages", i, "train"), "names a part twice."
        planned = sum(stage.steps or 0 for stage in self.stages)
        if self.max_steps is not None and planned >= self.max_steps:
            yield ("stages",), f"the last one would start at step {planned} of max_steps = {self.max_steps}."

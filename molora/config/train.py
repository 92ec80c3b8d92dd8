"""The `train` section: steps, batches, learning rates, precision, stages and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from molora.config.section import (
    NonNegative,
    Positive,
    PositiveInt,
    Problem,
    Section,
    refuse,
    without_default,
)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
Part = Literal["experts", "gates", "heads"]


class StageConfig(Section):
    """A part of training in which only some parameters learn; the last stage runs until the end."""

    steps: PositiveInt | None = None
    train: list[Part] = Field(min_length=1)


class TrainConfig(Section):
    """How the adapter is trained."""

    max_steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 16
    accumulate: PositiveInt = 1
    lr: Positive = 1e-3
    gate_lr: Positive | None = None
    head_lr: Positive | None = None
    lora_plus_ratio: Positive = 1.0
    weight_decay: NonNegative = 0.0
    gate_weight_decay: NonNegative = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int | float = 0.05
    clip: Positive | None = 1.0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    gradient_checkpointing: bool = False
    stages: list[StageConfig] = Field(default_factory=list)
    val_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    save_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] | None = None  # csv: always
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    devices: PositiveInt | list[int] | Literal["auto"] = 1
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"

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

"""How long a step takes, measured: a few real ones, of which nothing is kept."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.models.features import fit_features
from molora.training.checkpoint import StepCallback
from molora.training.optimise import optimise
from molora.training.steps import total_steps

MEASURED = 3


class _Clock(StepCallback):
    """When each step was done, on the device too."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())


def time_steps(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: TaskSet
) -> tuple[float, int]:
    """Seconds of a step, the median of `MEASURED` after one that warms up, and how many steps the recipe takes.

    The model is trained meanwhile; batches are the first ones of the run.
    """
    data = MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed)
    steps = total_steps(config.train, len(data.train_dataloader()))
    fit_features(config, model, data, tokenizer)
    changes: dict[str, Any] = {
        "max_steps": MEASURED + 1,
        "epochs": None,
        "stages": [],
        "val_every": None,
        "patience": None,
    }
    clock = _Clock()
    optimise(model, data, config.train.model_copy(update=changes), callbacks=[clock])
    durations = [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return median(durations), steps

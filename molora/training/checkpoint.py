"""Checkpoints: atomic folders, exact random state, and what may be written into them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import nn

from molora.disk.atomic import remove_folder, write_folder
from molora.disk.manifest import is_complete, verify_folder
from molora.errors import AdapterError, DivergedError
from molora.store.checkpoints import STATE_FILE
from molora.store.runs import checkpoint_step, checkpoints

WEIGHTS_FILE = "adapter_model.safetensors"


class FolderIO(CheckpointIO):
    """Lightning checkpoints as folders with a manifest of hashes: the adapter's weights, and the trainer's other state.

    They are written whole or not at all; reading checks the manifest first and unpickles nothing but plain data.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` as the folder `path`, replacing a damaged one of that name."""
        if Path(path).is_dir() and not is_complete(path):
            remove_folder(path)  # worth nothing; its manifest may be what is damaged
        state = dict(checkpoint)
        weights = {name: tensor.contiguous() for name, tensor in state.pop("state_dict").items()}
        with write_folder(path) as folder:
            save_file(weights, folder / WEIGHTS_FILE)
            with (folder / STATE_FILE).open("wb") as file:  # by its name, torch hides why a write failed
                torch.save(state, file)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read the folder `path`; raises AdapterError where it is damaged."""
        folder = Path(path)
        verify_folder(folder)
        try:
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            weights = load_file(folder / WEIGHTS_FILE)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _unreadable(
                folder, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        if not isinstance(state, dict):
            raise _unreadable(folder, f"its state is a {type(state).__name__}")
        return {**state, "state_dict": weights}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the folder `path`."""
        remove_folder(path)


def _unreadable(folder: Path, why: str) -> AdapterError:
    return AdapterError(
        f"the checkpoint {folder} cannot be read: {why}.",
        hint="delete its folder to resume from an earlier one.",
    )


def random_state() -> dict[str, Any]:
    """The state of every random generator that training may draw from, as plain data."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, that of the newest good one.

    Later ones are damaged: the run goes on from the newest good one.
    """
    so_far = [path for path in checkpoints(folder) if checkpoint_step(path) <= step]
    for old in so_far[:-keep]:
        remove_folder(old)


def of_every_process(mine: Any) -> list[Any]:
    """A value of each process, by rank; every process takes part."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


class RandomState(Callback):
    """Hands the random state from the end of one training batch to the start of the next.

    So what draws in between (validation, a new worker) does not change what training draws, and a checkpoint written in
    between holds exactly what the next batch will see.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []  # one per process

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # All processes were seeded alike, to build the same model.
        if not self._states and trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        self._states = self._states or [random_state()]  # a checkpoint of the very start has one too

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._states = [random_state()]

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._states:
            mine = trainer.global_rank if trainer.global_rank < len(self._states) else 0
            restore_random_state(self._states[mine])

    def state_dict(self) -> dict[str, Any]:
        return {"states": [state for part in of_every_process(self._states) for state in part]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._states = state["states"]


def require_finite(module: nn.Module, step: int) -> None:
    """Raise DivergedError if any trainable parameter is not finite."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise DivergedError(
                f"the weights are no longer finite at step {step}: {name}.",
                hint="the last checkpoint is intact; lower train.lr or set train.clip, then resume or start again.",
            )


class StepCallback(Callback, ABC):
    """A callback with one hook, called once per optimiser step whatever the accumulation."""

    _step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_step(trainer, module, self._step)

    @abstractmethod
    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Called after optimiser step number `step` (1 = the first)."""


class Checkpoints(StepCallback):
    """Writes `step-000200/` every `every` steps and at the end, `first` also at the start; keeps the newest `keep`."""

    def __init__(self, folder: Path, every: int, keep: int, *, first: bool = False) -> None:
        self.folder, self.every, self.keep, self.first = folder, every, keep, first

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # Only the first process made the run folder; the others learn its name here.
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        if self.first and trainer.global_step == 0:
            self.save(trainer, module)

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if step % self.every == 0 or step == trainer.max_steps or trainer.should_stop:
            self.save(trainer, module)

    def save(self, trainer: Trainer, module: LightningModule) -> Path:
        """Write a checkpoint of this step; a good one of the same step is left alone."""
        path = self.folder / f"step-{trainer.global_step:06d}"
        require_finite(module, trainer.global_step)
        missing = trainer.is_global_zero and not is_complete(path)
        if trainer.strategy.broadcast(missing):  # every process takes part in a save, or none
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            delete_old(self.folder, trainer.global_step, self.keep)
        return path

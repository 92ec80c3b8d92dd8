"""The weights of a run as they were after one of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file

from molora.disk.card import WEIGHTS_FILE
from molora.errors import AdapterError
from molora.store.runs import Run, checkpoint_step
from molora.tuner.ranks import set_ranks

STATE_FILE = "trainer_state.pt"  # of a checkpoint folder, beside its weights


def checkpoint_of(run: Run, step: int) -> Path:
    """The checkpoint of that step; AdapterError that names those there are."""
    found = {checkpoint_step(path): path for path in run.checkpoints}
    if step not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise AdapterError(
            f"{run.path} has no undamaged checkpoint of step {step}. Steps it has: {steps}.",
            hint="train.save_every and train.keep_checkpoints say how many are written and kept.",
        )
    return found[step]


def ranks_in(checkpoint: Path) -> dict[str, int]:
    """The ranks that experts had grown to by a checkpoint folder; empty where none grows."""
    state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    return dict(state.get("growth", {}).get("ranks", {}))


def put_weights(model: PeftModel, checkpoint: Path) -> None:
    """Give the active adapter the weights of a checkpoint folder; AdapterError where they do not fit the model."""
    config: Any = model.peft_config[str(model.active_adapter)]
    config.weights_sha256 = None  # the digest noted at the last save is of other weights
    if ranks := ranks_in(checkpoint):
        set_ranks(model, ranks)
    set_peft_model_state_dict(model, load_file(checkpoint / WEIGHTS_FILE), str(model.active_adapter))

"""molora.load: a saved adapter on a base that is given, or a run or an adapter with its base and tokenizer."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, overload

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from molora.errors import ConfigError
from molora.models.build import load_trained
from molora.store.adapter import load as load_adapter
from molora.store.runs import Run

Place = str | os.PathLike[str]


class Loaded(NamedTuple):
    """A trained mixture on its base, in eval mode, and the tokenizer."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


@overload
def load(
    base: Place | Run,
    *,
    checkpoint: int | None = None,
    device: str | torch.device | None = None,
    is_trainable: bool = False,
    allow_other_base: bool = False,
) -> Loaded: ...
@overload
def load(
    base: nn.Module,
    path: Place,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_other_base: bool = False,
) -> PeftModel: ...
def load(
    base: nn.Module | Place | Run,
    path: Place | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_other_base: bool = False,
    checkpoint: int | None = None,
    device: str | torch.device | None = None,
) -> PeftModel | Loaded:
    """`model, tokenizer = molora.load("runs/quickstart")`, or `model = molora.load(base, "adapter")`.

    Args:
        base: a run, a run folder, `runs/<name>`, or an adapter folder that says which base it is of, which is loaded with
            it; or a transformers model, which is changed in place, as in PEFT.
        path: the adapter folder to put on a `base` that is a model.
        checkpoint: of a run, as it was after this step.
        device: default a CUDA device where there is one.
        adapter_name, is_trainable, allow_other_base: as `molora.store.adapter.load`.

    Raises:
        AdapterError: a damaged or incomplete folder, or another base. ConfigError: neither a run nor an adapter.
    """
    settings: dict[str, Any] = {"allow_other_base": allow_other_base}
    if isinstance(base, nn.Module):
        if path is None:
            raise ConfigError(
                "molora.load(base) was given no adapter folder.",
                hint="molora.load(base, path), or molora.load(path) with the base that the adapter names.",
            )
        if checkpoint is not None or device is not None:
            raise ConfigError("checkpoint and device are for molora.load(run), which loads the base too.")
        return load_adapter(base, path, adapter_name=adapter_name, is_trainable=is_trainable, **settings)
    if path is not None or adapter_name != "default":
        raise ConfigError("molora.load(base, path): the base is a model here, not a folder.")
    where = base.path if isinstance(base, Run) else os.fspath(base)
    model, tokenizer, _ = load_trained(
        where, trainable=is_trainable, device=device, checkpoint=checkpoint, **settings
    )
    return Loaded(model, tokenizer)

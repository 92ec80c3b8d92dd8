"""The process that trains: seeds, quiet libraries, and what env.json remembers of it."""

from __future__ import annotations

import logging
import os
import platform
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from molora.errors import explained
from molora.progress import shown
from molora.training.heap import keep_freed_memory

_PACKAGES = ("molora", "torch", "transformers", "peft", "lightning", "safetensors", "bitsandbytes")

# Advice that is wrong or already followed here, by the words it starts with.
_UNHELPFUL = (
    r".*does not have many workers",  # records are small and encoded once
    r".*available but not used",  # the recipe said which device
    r"Found \d+ module\(s\) in eval mode",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"You have overridden `on_before_batch_transfer`",  # the data module has none of its own
    r"MatMul8bitLt: inputs will be cast",  # what int8 does in every layer
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated",
)


def prepare_process(seed: int) -> None:
    """Seed every generator and keep freed memory (see heap.py)."""
    keep_freed_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Third-party chatter off: what is left on the terminal is molora's own, errors of memory and disk among them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    loading = logging.getLogger("transformers.modeling_utils")
    hook = set_tqdm_hook(lambda _, args, kwargs: EmptyTqdm(*args, **kwargs))
    downloads = not sys.stderr.isatty() and not are_progress_bars_disabled()
    with warnings.catch_warnings():
        for pattern in _UNHELPFUL:
            warnings.filterwarnings("ignore", message=pattern)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        loading.addFilter(_no_load_report)
        if downloads:
            disable_progress_bars()
        try:
            with explained():
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            loading.removeFilter(_no_load_report)
            set_tqdm_hook(hook)
            if downloads:
                enable_progress_bars()


def _no_load_report(record: logging.LogRecord) -> bool:
    """A head is new on purpose, and what else a checkpoint lacks is said by models.new_parts."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "CONVERSION" in text


@contextmanager
def at_work() -> Iterator[None]:
    """`quiet_libraries`, with molora's own progress shown by the first process."""
    with quiet_libraries(), shown(is_first_process()):
        yield


def is_first_process() -> bool:
    """Whether this process, of those that train together, is the one that writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


def describe_environment() -> dict[str, Any]:
    """Versions and hardware a result may depend on; nothing that identifies the user."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }

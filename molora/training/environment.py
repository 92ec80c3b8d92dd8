"""The process that trains: seeds, quiet libraries, and what env.json remembers of it."""

from __future__ import annotations

import logging
import os
import platform
import random
import warnings
from importlib import metadata
from typing import Any

import numpy as np
import torch

from molora.training.allocator import keep_freed_memory

_PACKAGES = ("molora", "torch", "transformers", "peft", "lightning", "safetensors", "bitsandbytes")

# Advice that is wrong or already followed here, by the words it starts with.
_UNHELPFUL = (
    r".*does not have many workers.*",  # records are small and tokenised once
    r".*available but not used.*",  # the recipe said which device
    r"Found \d+ module\(s\) in eval mode.*",
    r".*`lightning.pytorch.loggers.*",
    r".*torchmetrics.*",
)


def prepare_process(seed: int) -> None:
    """Seed every generator, keep freed memory (see allocator.py) and silence third-party chatter."""
    keep_freed_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _UNHELPFUL:
        warnings.filterwarnings("ignore", message=pattern)


def describe_environment() -> dict[str, Any]:
    """Versions and hardware a result may depend on; nothing that identifies the user."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }

"""Run by test_fresh_process: loads every adapter under a folder by every loader, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import molora  # noqa: F401  (registers the method, as a user's script would)
from tests.zoo import batch_for, routed

AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification,
        "t5": AutoModelForSeq2SeqLM}  # fmt: skip
AUTO_PEFT = {"llama": AutoPeftModelForCausalLM, "gpt2": AutoPeftModelForCausalLM,
             "bert": AutoPeftModelForSequenceClassification, "t5": AutoPeftModelForSeq2SeqLM}  # fmt: skip
SIZES = {"llama": {}, "gpt2": {}, "bert": {"num_labels": 3}, "t5": {}}


def load(loader: str, architecture: str, base: Path, adapter: Path) -> nn.Module:
    """A model with its adapter, by one of the ways a user has."""
    auto, sizes = AUTO[architecture], SIZES[architecture]
    if loader == "AutoPeftModel":
        return AUTO_PEFT[architecture].from_pretrained(adapter, **sizes)
    if loader == "transformers AutoModel":
        return auto.from_pretrained(adapter, **sizes)
    model = auto.from_pretrained(base)
    if loader == "transformers load_adapter":
        model.load_adapter(str(adapter))
        return model
    options: dict[str, Any] = {
        "PeftModel": {},
        "PeftModel trainable": {"is_trainable": True},
        "PeftModel low memory": {"low_cpu_mem_usage": True},
        "PeftModel other name": {"adapter_name": "other"},
    }[loader]
    return PeftModel.from_pretrained(model, adapter, **options)


LOADERS = ("PeftModel", "PeftModel trainable", "PeftModel low memory", "PeftModel other name", "AutoPeftModel",
           "transformers AutoModel", "transformers load_adapter")  # fmt: skip


def main(root: Path) -> None:
    """Write {(architecture, gate, loader): (logits, names of trainable parameters)} to root/loaded.pt."""
    found: dict[Any, Any] = {}
    found["peft, then molora"] = type(
        PeftConfig.from_pretrained(next((root / "adapters").iterdir()))
    ).__name__
    for adapter in sorted((root / "adapters").iterdir()):
        architecture, gate = adapter.name.split("+")
        for loader in LOADERS:
            model = load(loader, architecture, root / "bases" / architecture, adapter).eval()
            with torch.no_grad():
                logits = model(**batch_for(architecture), **routed(gate)).logits
            trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
            found[architecture, gate, loader] = (logits, trainable)
    torch.save(found, root / "loaded.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

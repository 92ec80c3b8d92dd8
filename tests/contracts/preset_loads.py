"""Run by test_presets: loads every saved preset under a folder in one process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import molora  # before peft, which must find the method nevertheless
from tests.zoo import base_model, batch_for, preset_inputs


def main(root: Path) -> None:
    """Write {name: logits} to root/loaded.pt."""
    from peft import PeftConfig

    found: dict[str, Any] = {}
    found["molora, then peft"] = type(
        PeftConfig.from_pretrained(next((root / "adapters").iterdir()))
    ).__name__
    for adapter in sorted((root / "adapters").iterdir()):
        architecture, name = adapter.name.split("+")
        model = molora.load(base_model(architecture), adapter)
        with torch.no_grad():
            found[adapter.name] = model(**batch_for(architecture), **preset_inputs(model, name)).logits
    torch.save(found, root / "loaded.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Runs whose experts have virtual tokens: a resumed one is the same, and the vectors have a rate of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from molora.training.module import MoLoraModule
from molora.training.train import train
from tests.training.runs import adapter_weights, assert_same_weights, recipe_for, write_base


@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")

    def recipe(folder: str, **changes: Any) -> dict[str, Any]:
        made = recipe_for(base, tmp_path / folder, max_steps=4, save_every=1, **changes)
        made["adapter"] = {"num_experts": 2, "r": 2, "gate": "sequence", "num_virtual_tokens": 2}
        return made

    full, step, batches = train(recipe("full")), MoLoraModule.training_step, 0

    def crash(self: MoLoraModule, *args: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyError("a crash")
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoLoraModule, "training_step", crash)
        with pytest.raises(KeyError):
            train(recipe("killed"))
    assert_same_weights(full.adapter, train(recipe("killed"), resume=True).adapter)
    moved, fast = (
        next(t for name, t in adapter_weights(run.adapter).items() if name.endswith("tokens.weight"))
        for run in (full, train(recipe("fast", prompt_lr=0.1)))
    )
    assert moved.shape == fast.shape == (2, 2, 32) and not torch.equal(moved, fast)

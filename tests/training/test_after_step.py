"""Experts that look at every step (AdaLoRA's budget) do so in molora's training, resumed or not, and in the HF Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import molora
from molora.training import module
from molora.training.train import train
from tests.training.runs import adapter_weights, assert_same_weights, recipe_for
from tests.training.test_hf import MoLoraTrainer, trainer_for
from tests.zoo import molora_model

BUDGET = {"target_r": 1, "tinit": 1, "tfinal": 2}


def values(weights: dict[str, Tensor]) -> int:
    """Singular values that are not zero."""
    return sum(int(tensor.count_nonzero()) for name, tensor in weights.items() if name.endswith(".E"))


def test_a_recipe_ends_within_its_budget_and_a_resumed_run_is_the_same(base: Path, tmp_path: Path) -> None:
    def recipe(folder: str) -> dict[str, Any]:
        made = recipe_for(base, tmp_path / folder, max_steps=6, save_every=1, weight_decay=0.1)
        made["adapter"] |= {"kind": "adalora", "kind_settings": BUDGET, "aux_losses": {"orthonormal": 0.1}}
        return made

    full = train(recipe("full"))
    found = adapter_weights(full.adapter)
    experts = sum(len(tensor) for name, tensor in found.items() if name.endswith(".E"))
    assert values(found) == experts < sum(t.numel() for name, t in found.items() if name.endswith(".E"))

    def crash(model: Any, step: int, total: int, *_: Any) -> None:
        if step == 4:
            raise KeyError("a crash")
        molora.after_step(model, step, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "after_step", crash)
        with pytest.raises(KeyError):
            train(recipe("killed"))
    assert_same_weights(full.adapter, train(recipe("killed"), resume=True).adapter)


def test_the_trainer_with_the_mixin_keeps_to_the_budget(tmp_path: Path) -> None:
    model = molora_model("llama", trained=False, kind="adalora", kind_settings=BUDGET)
    trainer_for(
        MoLoraTrainer, model, tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2
    ).train()
    banks = [mount for mount in model.state_dict() if mount.endswith(".E")]
    assert values(model.state_dict()) == sum(len(model.state_dict()[name]) for name in banks)


def test_a_recipe_draws_masks_by_the_loss_of_its_last_batch(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path, max_steps=4)
    settings = {"keep": 0.25, "scores": "grasp", "after": 3}
    recipe["adapter"] |= {"kind": "sparse", "kind_settings": settings}
    found = adapter_weights(train(recipe).adapter)
    for name, tensor in found.items():
        if name.endswith((".A", ".B")):
            assert tensor.count_nonzero() == round(0.25 * tensor[0].numel()) * len(tensor), name

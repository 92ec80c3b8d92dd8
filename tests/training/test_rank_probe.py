"""`molora rank`: what is measured is what its formula says, and what follows from it is the least or the fairest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from molora.config import load_recipe
from molora.errors import ConfigError
from molora.training.objective import Supervised
from molora.training.rank_probe import LayerShare, added, dealt, kept, mounts_of, probe, sensitivity
from molora.tuner.layer import MoLoraLayer
from tests.training.runs import recipe_for
from tests.zoo import batch_for, molora_model


def model_of() -> Any:
    model = molora_model("llama", "task-group", dtype=torch.float64)
    with torch.no_grad():
        mounts_of(model)[1].bank.stacks["B"].trainable.zero_()
    return model


def batch() -> dict[str, Any]:
    return {**batch_for("llama", padding="right"), "routing_task_ids": ["alpha", "beta", "gamma"]}


def test_drop_measures_what_the_gates_let_experts_add_over_tokens_without_padding() -> None:
    model = model_of()
    seen: dict[str, torch.Tensor] = {}
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    for layer in layers:
        key = layer.mounts["default"].key
        layer.register_forward_hook(lambda m, args, out, key=key: seen.__setitem__(key, args[0].detach()))
    found = added(model, Supervised(), [batch()])
    model(**batch())
    mask = batch()["attention_mask"].bool()
    assert not mask.all()
    for layer in layers:
        mount = layer.mounts["default"]
        rows = torch.cat(
            [
                (seen[mount.key][i] @ mount.bank.expert(i).delta().T)[mask[i]].square().sum(-1)
                for i in range(3)
            ]
        )
        assert_close(found[mount.key], rows.mean().item(), atol=1e-6, rtol=1e-5)
    assert found[layers[1].mounts["default"].key] == 0
    assert not any(layer._forward_hooks_with_kwargs for layer in layers)


def test_sensitivity_is_the_sum_of_weight_times_gradient() -> None:
    model, one = model_of(), batch()
    found = sensitivity(model, Supervised(), [one, one])
    model(**one).loss.backward()
    for mount in mounts_of(model):
        expected = 0.0
        for stack in mount.bank.stacks.values():
            w, g = stack.trainable.detach().flatten().tolist(), stack.trainable.grad.flatten().tolist()
            expected += sum(abs(a * b) for a, b in zip(w, g, strict=True))
        assert_close(found[mount.key], expected, atol=1e-9, rtol=1e-9)


def shares(*values: float, numbers: int = 80) -> list[LayerShare]:
    return [LayerShare(f"layer{i}", value, 8, numbers) for i, value in enumerate(values)]


def test_the_fewest_layers_are_kept_in_their_order() -> None:
    layers = shares(1.0, 5.0, 0.0, 4.0)
    assert kept(layers, 0.9) == ["layer1", "layer3"]
    assert kept(layers, 0.91) == ["layer0", "layer1", "layer3"]
    assert kept(layers, 1.0) == ["layer0", "layer1", "layer3"]  # what adds nothing is never needed
    with pytest.raises(ConfigError, match="no layer adds anything"):
        kept(shares(0.0, 0.0), 0.9)


def test_ranks_are_dealt_in_proportion_and_within_the_parameters_there_are() -> None:
    assert dealt(shares(3.0, 1.0), 32) == {"layer0": 12, "layer1": 4}
    assert dealt(shares(3.0, 1.0), 10) == {"layer0": 10, "layer1": 6}
    wide = [LayerShare("wide", 1.0, 8, 800), LayerShare("narrow", 1.0, 8, 80)]
    found = dealt(wide, 64)
    assert 100 * found["wide"] + 10 * found["narrow"] <= 880 and min(found.values()) >= 1
    assert dealt(shares(1.0, 0.0), 99) == {"layer0": 15, "layer1": 1}


def test_what_cannot_be_measured_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path)
    with pytest.raises(ConfigError, match="--method dropp is not one of drop, sensitivity"):
        probe(load_recipe(recipe), "dropp", 1)
    recipe["adapter"] |= {"ffn_targets": ["up_proj", "gate_proj", "down_proj"]}
    with pytest.raises(ConfigError, match="ffn_targets mixes whole feed-forwards"):
        probe(load_recipe(recipe), "drop", 1)

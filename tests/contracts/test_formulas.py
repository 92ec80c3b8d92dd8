"""Every preset is its paper's formula, written as loops: logits and the gradient of every parameter, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import molora
from tests.contracts.formulas import FORMULAS, reference_logits
from tests.zoo import base_model, batch_for, preset_inputs, preset_model, randomise


def test_every_preset_has_a_formula():
    assert sorted(FORMULAS) == sorted(molora.list_presets())


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_is_the_formula(name):
    model = preset_model("llama", name, lora_dropout=0.0).double().eval()
    randomise(model, std=0.5)
    batch, inputs = batch_for("llama", seq=3), preset_inputs(model, name)
    learned = {key: p for key, p in model.named_parameters() if p.requires_grad}
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    direction = torch.randn(3, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    known = list(model.peft_config["default"].task_ids or [])
    tasks = [known.index(task) for task in inputs.get("routing_task_ids", [])] or [0, 0, 0]
    features = inputs["routing_features"].double() if "routing_features" in inputs else None
    plain = base_model("llama").double()
    expected = reference_logits(model, plain, name, batch, tasks, features)
    wanted = torch.autograd.grad((expected * direction).sum(), list(learned.values()), allow_unused=True)
    actual = model(**ids, **inputs).logits
    found = torch.autograd.grad((actual * direction).sum(), list(learned.values()), allow_unused=True)

    assert (actual - base_model("llama").double()(**batch).logits).norm() > 0.1  # the experts do something
    assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    for key, ours, theirs in zip(learned, found, wanted, strict=True):
        zero = torch.zeros_like(learned[key])
        ours, theirs = (zero if g is None else g for g in (ours, theirs))
        assert_close(ours, theirs, atol=1e-8, rtol=1e-7, msg=lambda text, key=key: f"{key}: {text}")

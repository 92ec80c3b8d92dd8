"""One adapted layer by itself, as PEFT's own tools use layers: its sizes, its delta, its merge."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from molora import ConfigError
from molora.tuner.layer import MoLoraLayer
from tests.zoo import batch_for, molora_model


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MoLoraLayer)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_layer_has_the_sizes_of_its_base(architecture):
    for layer in layers(molora_model(architecture)).values():
        shape = layer.get_base_layer().weight.shape
        d_out, d_in = shape if architecture == "llama" else shape[::-1]
        assert (layer.in_features, layer.out_features) == (d_in, d_out)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_merged_one_by_one_are_the_merged_model(architecture):
    model = molora_model(architecture, "constant-global", dtype=torch.float64)
    batch = batch_for(architecture)
    expected = model(**batch).logits
    for layer in layers(model).values():
        before, delta = layer.get_base_layer().weight.clone(), layer.get_delta_weight("default")
        layer.merge()
        assert_close(layer.get_base_layer().weight, before + delta, atol=1e-12, rtol=0)
    assert_close(model(**batch).logits, expected, atol=1e-9, rtol=1e-9)
    for layer in layers(model).values():
        layer.unmerge()
    assert_close(model(**batch).logits, expected, atol=1e-12, rtol=1e-12)


def test_a_layer_whose_weights_depend_on_the_input_or_the_task_says_so():
    for gate, message in (("top2-group", "depend on the input"), ("task-group", "depend on the task")):
        layer = next(iter(layers(molora_model("llama", gate)).values()))
        with pytest.raises(ConfigError, match=message):
            layer.merge()
        assert not layer.merged


def test_a_merge_that_fails_leaves_no_weights_behind(monkeypatch):
    model = molora_model("llama", "task-group")
    some = next(iter(layers(model).values()))
    monkeypatch.setattr(type(some), "merge", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.merge_adapter(task="alpha")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="depend on the task"):
        some.merge()


def test_experts_without_values_are_refused_not_multiplied():
    model = molora_model("llama")
    layer = next(iter(layers(model).values()))
    layer.molora_experts.to(
        "meta"
    )  # as accelerate's offloading leaves them: it brings weights to called modules only
    with pytest.raises(ConfigError, match="offload the base first"):
        model(**batch_for("llama"))

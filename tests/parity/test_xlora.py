"""PEFT's X-LoRA is a two-pass gate over the same experts, its classifier the gate's rows."""

from __future__ import annotations

import pytest
import torch
from peft import XLoraConfig, get_peft_model
from torch.testing import assert_close

from molora import GateConfig
from tests.parity.peers import (
    LINEARS,
    base,
    copy_loras,
    differs,
    fill,
    lora_tensors,
    molora_layers,
    molora_on_llama,
    peer_layers,
    save_loras,
)
from tests.zoo import batch_for

HIDDEN = 16
R, ALPHA = 4, 6
ORDER = [[0, 1, 2]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), [R] * 3, [ALPHA] * 3, torch.float64)


def xlora_model(paths, xlora_depth=1, **settings):
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=HIDDEN,
        adapters={str(i): path for i, path in enumerate(paths)},
        xlora_depth=xlora_depth,
        **settings,
    )
    llama = base()
    llama.config.use_cache = False  # PEFT insists
    model = get_peft_model(llama, config).eval()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    fill(model.base_model.internal_xlora_classifier.parameters(), seed=4, std=0.5)
    return model


def classifier(xlora):
    """Its last, mostly only, linear layer: weight (adapters, hidden), or (linears * adapters, hidden)."""
    return xlora.base_model.internal_xlora_classifier.layers[-1]


def ours(xlora, share, **gate):
    """molora's model of the same experts and classifier."""
    settings = {"scope": "two_pass", "score": "linear", "bias": True, "share": share, **gate}
    model = molora_on_llama(r=R, lora_alpha=ALPHA, gate=GateConfig(**settings))
    copy_loras(xlora, model, ["0", "1", "2"])
    linear = classifier(xlora)
    weight, bias = (p.detach().reshape(-1, 3, *p.shape[1:]) for p in (linear.weight, linear.bias))
    theirs, gates = peer_layers(xlora, "lora_A"), 0
    for key, layer in molora_layers(model).items():
        if "default" not in layer.molora_gate:
            continue
        number = theirs[key].forward.__self__.layer_number if share == "linear" else 0
        made = layer.molora_gate["default"]
        made.rows.assign(weight[number], ORDER, [False] * 3)
        made.bias.assign(bias[number], ORDER, [False] * 3)
        gates += 1
    assert gates == len(weight) == (LINEARS if share == "linear" else 1)
    return model


def agree(xlora, model, padding=None):
    """Compare every token's logits; returns them."""
    batch = batch_for("llama", padding=padding)
    expected = xlora(**batch, use_cache=False).logits
    actual = model(**batch, use_cache=False).logits
    assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    return actual


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_one_classifier_for_all_layers(saved, temperature, padding):
    xlora = xlora_model(saved, softmax_temperature=temperature)
    model = ours(xlora, "global", select="dense", temperature=temperature)
    actual = agree(xlora, model, padding)
    scalings = xlora.get_latest_scalings()  # (batch, seq, linears, adapters)
    assert scalings.std(dim=(0, 1)).min() > 0.01  # tokens are weighted differently
    assert differs(actual, base()(**batch_for("llama", padding=padding)).logits)


@pytest.mark.parametrize("padding", [None, "left"])
def test_layerwise_scalings_are_a_gate_for_every_linear(saved, padding):
    xlora = xlora_model(saved, layerwise_scalings=True)
    actual = agree(xlora, ours(xlora, "linear", select="dense"), padding)
    scalings = xlora.get_latest_scalings()
    assert scalings.std(dim=2).min() > 0.001  # linears are weighted differently
    shuffled = ours(xlora, "linear", select="dense")
    gates = [layer.molora_gate["default"] for layer in molora_layers(shuffled).values()]
    rows = [made.rows.weight.detach().clone() for made in gates]
    for made, others in zip(gates, [*rows[1:], rows[0]], strict=True):
        made.rows.set_weight(others)
    batch = batch_for("llama", padding=padding)
    assert differs(shuffled(**batch, use_cache=False).logits, actual)


@pytest.mark.parametrize(("layerwise", "share"), [(False, "global"), (True, "linear")])
@pytest.mark.parametrize("k", [1, 2])
def test_top_k_keeps_the_weights_of_the_best(saved, k, layerwise, share):
    xlora = xlora_model(saved, layerwise_scalings=layerwise, top_k_lora=k)
    actual = agree(xlora, ours(xlora, share, select="top_k", top_k=k, renorm="none"))
    dense = ours(xlora, share, select="dense")
    assert differs(dense(**batch_for("llama")).logits, actual)


def test_a_classifier_of_depth_two_is_the_mlp_score(saved):
    xlora = xlora_model(saved, xlora_depth=2, xlora_size=12)
    model = ours(xlora, "global", score="mlp", hidden=12, select="dense")
    first = xlora.base_model.internal_xlora_classifier.layers[0]
    (made,) = (m.molora_gate["default"] for m in molora_layers(model).values() if "default" in m.molora_gate)
    made.hidden.load_state_dict(first.state_dict())
    agree(xlora, model)


def test_without_softmax_scores_are_the_weights(saved):
    xlora = xlora_model(saved, enable_softmax=False)
    agree(xlora, ours(xlora, "global", select="dense", transform="identity"))


def test_softmax_over_the_best_scores(saved):
    xlora = xlora_model(saved, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2)
    agree(xlora, ours(xlora, "global", select="top_k", top_k=2, renorm="softmax"))


@pytest.mark.parametrize(("layerwise", "share"), [(False, "global"), (True, "linear")])
def test_gradients_of_classifier_and_experts(saved, layerwise, share):
    xlora = xlora_model(saved, use_trainable_adapters=True, layerwise_scalings=layerwise)
    for parameter in lora_tensors(xlora):
        parameter.requires_grad_(True)
    model = ours(xlora, share, select="dense")
    batch = batch_for("llama")
    expected, actual = xlora(**batch, use_cache=False).loss, model(**batch, use_cache=False).loss
    assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    expected.backward()
    actual.backward()
    linear, theirs = classifier(xlora), peer_layers(xlora, "lora_A")
    weight, bias = (p.grad.reshape(-1, 3, *p.shape[1:]) for p in (linear.weight, linear.bias))
    for key, layer in molora_layers(model).items():
        bank, lora = layer.molora_experts["default"], theirs[key]
        for i in range(3):
            A, B = (getattr(lora, f"lora_{f}")[str(i)].weight.grad for f in "AB")
            assert_close(bank.stacks["A"].trainable.grad[i], A, atol=1e-11, rtol=1e-9)
            assert_close(bank.stacks["B"].trainable.grad[i].t(), B, atol=1e-11, rtol=1e-9)
        if "default" in layer.molora_gate:
            number = lora.forward.__self__.layer_number if share == "linear" else 0
            made = layer.molora_gate["default"]
            assert weight[number].any()
            assert_close(made.rows.blocks[0].grad, weight[number], atol=1e-11, rtol=1e-9)
            assert_close(made.bias.blocks[0].grad, bias[number], atol=1e-11, rtol=1e-9)


def test_generation_with_a_cache_is_generation_without(saved):
    xlora = xlora_model(saved)  # PEFT turns the cache off and recomputes the prefix for every token
    model = ours(xlora, "global", select="dense")
    batch = batch_for("llama", padding="left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = xlora.generate(**inputs, max_new_tokens=6, do_sample=False)
    actual = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(actual, expected) and actual.shape[1] == 13

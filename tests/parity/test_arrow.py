"""PEFT's Arrow is a gate per linear over the absolute products of x and the experts' main directions.

PEFT finds a direction by 15 power iterations in float32 from a random start; molora's is exact. The
experts here have one direction that stands out, so that 15 are enough to compare the outputs.
"""

from __future__ import annotations

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from torch.testing import assert_close

from molora import GateConfig
from molora.gates.prototypes import arrow
from molora.tuner.config import ExpertSpec
from tests.parity.peers import (
    base,
    copy_loras,
    differs,
    molora_layers,
    molora_on_llama,
    peer_layers,
    save_loras,
)
from tests.zoo import batch_for

R, ALPHAS = 4, (4, 8, 12)  # scalings 1, 2 and 3
TASKS = ["task_0", "task_1", "task_2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), [R] * 3, ALPHAS, torch.float64)


def arrow_model(paths, stand_out=1.0, **settings):
    """PEFT's model, its prototypes built, which happens in the first forward."""
    config = ArrowConfig(rng_seed=0, **settings)
    model = create_arrow_model(base(), paths, config).eval()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    with torch.no_grad():
        for layer in peer_layers(model, "lora_arrow").values():
            for task in TASKS:
                layer.lora_A[task].weight[0] *= stand_out
        model(**batch_for("llama"))
    return model


def prototypes(peer):
    return {
        key: layer.lora_arrow["arrow_router"].prototypes
        for key, layer in peer_layers(peer, "lora_arrow").items()
    }


def ours(peer, rows=None, *, top_k=2, temperature=1.0):
    """molora's model of the same experts; rows by layer, or those molora finds.

    A softmax over the best one alone is 1: molora calls that hard.
    """
    select = {"select": "top_k", "top_k": top_k, "renorm": "softmax"} if top_k > 1 else {"select": "hard"}
    gate = GateConfig(score="linear", absolute=True, share="linear", temperature=temperature, **select)
    specs = {f"expert_{i}": ExpertSpec(r=R, lora_alpha=alpha) for i, alpha in enumerate(ALPHAS)}
    model = molora_on_llama(r=R, expert_specs=specs, gate=gate)
    copy_loras(peer, model, TASKS)
    for key, layer in molora_layers(model).items():
        made = layer.molora_gate["default"].rows
        found = arrow(layer.molora_experts["default"].experts()) if rows is None else rows[key]
        made.assign(found, made.order, [False] * 3)
    return model


def test_prototypes_are_the_same_directions(saved):
    peer = arrow_model(saved, stand_out=5.0)
    theirs = prototypes(peer)
    for key, layer in molora_layers(ours(peer)).items():
        rows = layer.molora_gate["default"].rows.weight.detach()
        assert rows.dtype == torch.float64
        assert_close(rows.norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)
        signs = (rows * theirs[key]).sum(dim=1, keepdim=True).sign()
        assert_close(rows * signs, theirs[key], atol=1e-6, rtol=0)  # float32


@pytest.mark.parametrize(
    ("top_k", "temperature", "padding"), [(1, 1.0, None), (2, 1.0, "left"), (2, 0.3, None), (3, 2.0, "left")]
)
def test_outputs_are_those_of_arrow(saved, top_k, temperature, padding):
    peer = arrow_model(saved, stand_out=5.0, top_k=top_k, router_temperature=temperature)
    model = ours(peer, top_k=top_k, temperature=temperature)
    batch = batch_for("llama", padding=padding)
    expected = peer(**batch).logits
    assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("top_k", "temperature", "padding"), [(1, 1.0, "left"), (2, 1.0, None), (2, 0.3, "left"), (3, 2.0, None)]
)
def test_outputs_with_its_own_prototypes(saved, top_k, temperature, padding):
    peer = arrow_model(saved, top_k=top_k, router_temperature=temperature)
    model = ours(peer, prototypes(peer), top_k=top_k, temperature=temperature)
    batch = batch_for("llama", padding=padding)
    expected = peer(**batch).logits
    assert_close(model(**batch).logits, expected, atol=1e-10, rtol=1e-10)
    assert differs(expected, base()(**batch).logits)
    other = ours(peer, prototypes(peer), top_k=top_k % 3 + 1, temperature=temperature)
    assert differs(other(**batch).logits, expected)  # how many experts a token has matters

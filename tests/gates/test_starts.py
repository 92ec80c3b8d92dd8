"""How gates start: each preset's as its release draws them, and everything else as before."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import GateConfig, MoLoraConfig
from molora.tuner.parts import new_gate

WIDE = 1024


def gate_of(name: str = "", **settings):
    """The gate of a preset, or of these settings, over inputs of width 1024."""
    torch.manual_seed(0)
    config = molora.preset(name) if name else MoLoraConfig(gate=GateConfig(**settings))
    if config.gate.scope == "two_pass":
        config.gate.feature_dim = WIDE  # the hidden states'
    return new_gate(config, "model.layers.0.mlp.up_proj", WIDE)


def assert_uniform(values, bound):
    """Within the bound, near it at both ends, and as spread as a uniform number is, within four standard errors."""
    values, n = values.detach(), values.numel()
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert values.square().mean().sqrt() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(n))
    assert values.abs().max() > bound * (1 - 20 / n)


@pytest.mark.parametrize(
    "name",
    ["adamole", "coin", "dynmole", "goat", "hmora", "hydralora", "loramoe", "llava_mole", "mola", "xlora"],
)
def test_rows_start_as_a_torch_linear_does(name):
    gate = gate_of(name)
    assert_uniform(gate.rows.weight, 1 / math.sqrt(WIDE))
    if gate.bias is not None:
        assert gate.bias.weight.abs().max() <= 1 / math.sqrt(WIDE) and (gate.bias.weight != 0).all()
    if gate.second is not None:
        assert_uniform(gate.second.weight, 1 / math.sqrt(WIDE))


def test_moelora_starts_with_normal_vectors_and_uniform_rows_over_them():
    config = molora.preset("moelora", tasks=[f"task_{i}" for i in range(8)])
    torch.manual_seed(0)
    gate = new_gate(config, "model.layers.0.mlp.up_proj", WIDE)
    assert_uniform(gate.rows.weight, 1 / math.sqrt(64))
    assert gate.tasks.weight.detach().std() == pytest.approx(1, rel=4 / math.sqrt(2 * 8 * 64))


@pytest.mark.parametrize(("name", "bound"), [("mtl_lora", 1 / math.sqrt(3)), ("poly", 1e-3), ("mhr", 1e-3)])
def test_tables_start_uniformly(name, bound):
    names = molora.preset(name).expert_names
    config = molora.preset(name, tasks={f"task_{i}": names for i in range(64)})
    torch.manual_seed(0)
    assert_uniform(new_gate(config, "model.layers.0.mlp.up_proj", WIDE).tasks.weight, bound)


@pytest.mark.parametrize(("name", "std"), [("mixlora", 0.02), ("molora", 0.02), ("meteora", 1.0)])
def test_rows_that_are_normal_in_the_release_stay_so(name, std):
    rows = gate_of(name).rows.weight.detach()
    assert rows.std() == pytest.approx(std, rel=4 / math.sqrt(2 * rows.numel()))
    assert rows.abs().max() > 2.5 * std


def test_mocle_is_as_sure_at_its_start_as_the_release():
    """There a cluster's row is an embedding N(0, 1) of 384 numbers times a linear layer."""
    best = []
    for seed in range(20):
        torch.manual_seed(seed)
        gate = new_gate(molora.preset("mocle"), "model.layers.0.self_attn.q_proj", WIDE).eval()
        there = torch.nn.Linear(384, 4)(torch.nn.Embedding(64, 384).weight)
        probs = [
            scores.detach().div(0.05).softmax(-1) for scores in (gate(torch.eye(64)).logits[:, :4], there)
        ]
        best.append([p.max(dim=-1).values.mean() for p in probs])
    ours, released = torch.tensor(best).mean(dim=0)
    assert_close(ours, released, atol=0.01, rtol=0)
    assert released > 0.9


def test_the_defaults_draw_what_they_always_drew():
    gate = gate_of(bias=True)
    torch.manual_seed(0)
    assert torch.equal(gate.rows.weight, torch.randn(8, WIDE) * 0.02)
    assert not gate.bias.weight.any()


def test_a_standard_deviation_replaces_a_presets_own():
    gate = molora.preset("hydralora", gate={"init_std": 0.3}).gate
    assert (gate.init, gate.init_std) == ("uniform", 0.3)
    with pytest.raises(molora.ConfigError, match="a number or one of linear"):
        GateConfig(init_std="wide")
    with pytest.raises(molora.ConfigError, match="Did you mean 'uniform'"):
        GateConfig(init="unifrm")

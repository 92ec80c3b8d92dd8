"""A gate against its formula: selection, renormalisation, temperature, noise, restriction, blocks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from molora import ConfigError, GateConfig, MoLoraConfig
from molora.gates.gate import Gate
from molora.gates.rows import GateRows
from molora.tuner.gate_config import gate_from_kind
from molora.tuner.parts import new_gate


def gate(weight, **settings):
    experts = len(weight)
    return Gate(GateConfig(**settings), GateRows(weight, [list(range(experts))], [False] * experts))


def test_dense_is_a_softmax_with_temperature():
    weight, x = torch.randn(4, 8), torch.randn(5, 8)
    routing = gate(weight, select="dense", temperature=0.5)(x)
    assert_close(routing.weights, ((x @ weight.t()) / 0.5).softmax(-1))
    assert_close(routing.logits, x @ weight.t())


@pytest.mark.parametrize(("k", "renorm"), [(1, "none"), (2, "sum"), (2, "none"), (3, "sum")])
def test_top_k_keeps_the_largest_and_renormalises_as_told(k, renorm):
    weight, x = torch.randn(4, 8), torch.randn(16, 8)
    routing = gate(weight, select="top_k", top_k=k, renorm=renorm)(x)
    probs = (x @ weight.t()).softmax(-1)
    for row, prob, share in zip(routing.weights, probs, routing.selected, strict=True):
        best = prob.argsort(descending=True)[:k]
        expected = torch.zeros(4)
        expected[best] = prob[best] / prob[best].sum() if renorm == "sum" else prob[best]
        assert_close(row, expected)
        assert share.sum() == pytest.approx(1) and set(share.nonzero().flatten().tolist()) == set(
            best.tolist()
        )


def test_top_1_gives_the_router_a_gradient():
    weight = torch.randn(4, 8)
    module = gate(weight, select="top_k", top_k=1, renorm="none")
    (module(torch.randn(6, 8)).weights.sum()).backward()
    assert module.rows.blocks[0].grad.abs().max() > 0


def test_restrictions_renormalise_over_what_is_allowed():
    weight, x = torch.randn(4, 8), torch.randn(5, 8)
    module, logits = gate(weight, select="dense"), x @ weight.t()
    assert_close(module(x, experts=(1, 3)).weights, logits[:, [1, 3]].softmax(-1))
    allowed = torch.tensor([[True, False, True, True]]).expand(5, 4)
    weights = module(x, allowed=allowed).weights
    assert not weights[:, 1].any()
    assert_close(weights[:, [0, 2, 3]], logits[:, [0, 2, 3]].softmax(-1))


def test_noise_acts_in_training_only():
    module, x = gate(torch.randn(4, 8), select="dense", noise="gaussian", noise_std=1.0), torch.randn(5, 8)
    assert not torch.equal(module(x).weights, module(x).weights)
    module.eval()
    assert torch.equal(module(x).weights, module(x).weights)


def test_a_constant_gate_reads_nothing():
    table = torch.tensor([0.0, 1.0, 2.0])
    module = gate(table, scope="constant", select="dense")
    assert_close(module(torch.randn(5, 8)).weights, table.softmax(-1).unsqueeze(0))


def test_blocks_in_any_order_give_logits_in_expert_order():
    weight, x = torch.randn(4, 8), torch.randn(5, 8)
    rows = GateRows(weight, [[2], [0, 3], [1]], [False, True, False, False])
    assert_close(rows.logits(x), x @ weight.t())
    assert_close(rows.weight, weight)
    assert [block.requires_grad for block in rows.blocks] == [True, True, False]
    other = GateRows(torch.zeros(4, 8), [[0, 1, 2, 3]], [False] * 4)
    other.load_state_dict(rows.state_dict())
    assert_close(other.weight, weight)


def test_the_kinds_expand_to_the_long_fields():
    assert gate_from_kind("soft") == GateConfig(select="dense")
    assert gate_from_kind("top_k", top_k=3) == GateConfig(top_k=3)
    assert gate_from_kind("task") == GateConfig(scope="task")
    assert gate_from_kind("constant") == GateConfig(scope="constant", select="dense")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "tokens"}, "Did you mean 'token'"),
        ({"select": "topk"}, "Did you mean 'top_k'"),
        ({"share": "global"}, "cannot read each layer's own tokens"),
        ({"score": "table"}, "must be 'linear'"),
        ({"select": "hard", "transform": "identity"}, "goes with scope: task"),
        ({"top_k": 0}, "must be at least 1"),
        ({"temperature": 0.0}, "must be positive"),
        ({"select": "dense", "renorm": "sum"}, "already sum to 1"),
        ({"noise": "uniform"}, "gaussian"),
    ],
)
def test_what_cannot_mean_anything_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GateConfig(**settings)


def reading(score, **settings):
    torch.manual_seed(0)
    config = MoLoraConfig(
        num_experts=4, gate=GateConfig(score=score, select="dense", init_std=1.0, **settings)
    )
    module = new_gate(config, "layers.0.q_proj", 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_scores_against_their_formulas():
    x = torch.randn(5, 8)
    linear, mlp, cosine = reading("linear", bias=True), reading("mlp", bias=True, hidden=6), reading("cosine")
    assert_close(linear(x).logits, x @ linear.rows.weight.t() + linear.bias.weight)
    inner = (x @ mlp.hidden.weight.t() + mlp.hidden.bias).relu()
    assert_close(mlp(x).logits, inner @ mlp.rows.weight.t() + mlp.bias.weight)
    assert_close(
        cosine(x).logits, torch.cosine_similarity(x.unsqueeze(1), cosine.rows.weight.unsqueeze(0), dim=-1)
    )
    for module in (linear, mlp, cosine):
        module(x).weights.square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_a_learned_threshold_lies_between_zero_and_the_largest():
    settings = GateConfig(select="threshold", threshold=0.3, threshold_learned=True, renorm="none")
    config = MoLoraConfig(num_experts=4, gate=settings)
    module, x = new_gate(config, "layers.0.q_proj", 8), torch.randn(64, 8)
    probs = (x @ module.rows.weight.t()).softmax(-1)
    cut = 0.3 * (x @ module.threshold.weight.t() + module.threshold.bias).sigmoid()
    assert_close(module(x).weights, (probs - cut).relu())
    module(x).weights.square().sum().backward()
    assert module.threshold.weight.grad.abs().max() > 0
    assert MoLoraConfig(num_experts=5, gate=GateConfig(select="threshold")).gate.threshold == 0.2


@pytest.mark.parametrize("noise", ["gaussian", "gumbel", "logistic", "jitter"])
def test_every_noise_acts_in_training_only_and_leaves_x_alone(noise):
    transform = "sigmoid" if noise == "logistic" else "softmax"
    module = reading("linear", noise=noise, noise_std=0.5, transform=transform)
    x = torch.randn(400, 8)
    kept = x.clone()
    quiet = module.eval()(x).logits
    module.train()
    noisy = module(x).logits
    assert torch.equal(x, kept) and not torch.allclose(noisy, quiet)
    assert torch.equal(module.eval()(x).logits, quiet)
    spread = (noisy - quiet).detach().flatten()
    if noise == "jitter":  # Var of sum(x_i g_i u_i), u uniform of half-width 0.5: 0.5**2 / 3
        expected = ((x.square() @ module.rows.weight.t().square()) * 0.25 / 3).mean().sqrt().item()
        mean = 0.0
    else:
        variance = {"gaussian": 1.0, "gumbel": torch.pi**2 / 6, "logistic": torch.pi**2 / 3}[noise]
        expected, mean = 0.5 * torch.tensor(variance).sqrt(), 0.5 * 0.5772 if noise == "gumbel" else 0.0
    assert spread.std() == pytest.approx(float(expected), rel=0.1)
    assert spread.mean() == pytest.approx(mean, abs=0.1)

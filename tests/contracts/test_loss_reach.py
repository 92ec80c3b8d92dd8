"""Each auxiliary loss on each gate it is allowed on: a gradient where it should be, none elsewhere, no padding."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig
from molora.config.losses import AUX_LOSSES
from molora.tuner.layer import MoLoraLayer
from tests.zoo import GATES, HARD, SHARED, TASKS, batch_for, config_for, gradients, molora_model, routed

GATE_LOSSES = [name for name in AUX_LOSSES if AUX_LOSSES[name].of_gate and name != "load"]
# Gates given so that most losses are allowed on them.
MORE = {
    "noisy-top1": GateConfig(top_k=1, noise="gaussian", noise_std=0.5, share="linear"),
    "raw-constant": GateConfig(scope="constant", transform="identity", select="dense"),
    "raw-token": GateConfig(transform="identity", select="dense", share="linear"),
}
# Losses that need another gate than most.
ELSEWHERE = {"l1": "raw-token", "margin": "topcut-group"}


def settings(gate, *losses):
    """How to build a model of that gate with these losses."""
    tasks = list(TASKS) if gate in HARD else SHARED
    return MORE.get(gate, gate), {"aux_losses": dict.fromkeys(losses, 1.0), "tasks": tasks}


def build(gate, *losses):
    chosen, options = settings(gate, *losses)
    return molora_model("llama", chosen, **options)


def allowed(gate):
    """The losses that are not refused on that gate; a refusal names the loss."""
    found = []
    for loss in (*GATE_LOSSES, "load"):
        chosen, options = settings(gate, loss)
        try:
            config_for("llama", chosen, **options)
        except ConfigError as error:
            assert f"aux_losses.{loss}" in str(error)
        else:
            found.append(loss)
    return found


def inputs(gate):
    return {**routed(gate), "routing_task_ids": list(TASKS)}


@pytest.mark.parametrize("gate", [*GATES, *MORE])
def test_every_loss_that_is_allowed_reaches_every_gate(gate):
    losses = allowed(gate)
    if gate in ("top2-group", "soft-linear"):
        assert not {*GATE_LOSSES} - {"l1", "margin"} - {*losses}
    if gate in HARD:
        assert not losses
        return
    model = build(gate, *losses)
    torch.manual_seed(0)
    model.train()(**batch_for("llama"), **inputs(gate))
    values = molora.aux_losses(model)
    assert losses and values.keys() == {*losses}
    parts = {"task-table": ".tasks."}.get(gate, ".rows.")
    gates = [m for m in model.modules() if isinstance(m, MoLoraLayer) and "default" in m.molora_gate]
    for loss, value in values.items():
        assert value.isfinite(), loss
        model.zero_grad()
        value.backward(retain_graph=True)
        found = {name: g for name, g in gradients(model).items() if parts in name}
        assert len(found) == len(gates), loss
        assert all(g.isfinite().all() and g.any() for g in found.values()), loss
        # Experts get a gradient only through what later gates read.
        assert not any(
            ".default.stacks." in n and ".lora_" in n and ".1.mlp.down_proj" in n and g.any()
            for n, g in gradients(model).items()
        ), loss


@pytest.mark.parametrize("loss", GATE_LOSSES)
def test_padding_changes_no_loss(loss):
    gate = ELSEWHERE.get(loss, "soft-group")
    model = build(gate, loss).train()
    batch = batch_for("llama")
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    longer = {key: torch.nn.functional.pad(value, (0, 4), value=pad[key]) for key, value in batch.items()}
    model(**batch, **inputs(gate))
    expected = molora.aux_losses(model)[loss]
    model(**longer, **inputs(gate))
    assert_close(molora.aux_losses(model)[loss], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "loss", [name for name in GATE_LOSSES if name not in ("similarity", "localized", "l1")]
)
def test_a_response_mask_leaves_the_prompt_out(loss):
    batch = batch_for("llama")
    batch["labels"][:, :4] = -100
    gate = ELSEWHERE.get(loss, "soft-linear")
    model = molora_model(
        "llama", gate, tasks=SHARED, aux_losses={loss: {"coefficient": 1.0, "mask": "response"}}
    ).train()
    model(**batch, routing_task_ids=list(TASKS))
    value = molora.aux_losses(model)[loss]
    key = "model.layers.0.self_attn.q_proj"
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer) and m.mounts["default"].key == key)
    assert layer is not None
    everything = molora_model("llama", gate, tasks=SHARED, aux_losses={loss: 1.0}).train()
    everything(**batch, routing_task_ids=list(TASKS))
    assert not torch.isclose(molora.aux_losses(everything)[loss], value)


def test_contrastive_reaches_the_experts_and_not_the_gate():
    model = molora_model("llama", "top2-group", aux_losses={"contrastive": 1.0}).train()
    model(**batch_for("llama"))
    molora.aux_losses(model)["contrastive"].backward()
    found = gradients(model)
    assert found and all(".default.stacks." in name and ".lora_" in name for name in found)
    context = next(m for m in model.modules() if isinstance(m, MoLoraLayer)).context
    assert context.here.call is None and not context.call.cache.samples


def test_expert_similarity_is_one_for_equal_experts_and_falls_as_they_turn_away():
    model = molora_model(
        "llama", "top2-group", aux_losses={"expert_similarity": {"coefficient": 1.0, "factor": "both"}}
    )
    banks = [m.molora_experts["default"] for m in model.modules() if isinstance(m, MoLoraLayer)]
    for bank in banks:
        bank.assign([bank.expert(0)] * 3, [False] * 3)
    model.train()(**batch_for("llama"))
    assert_close(molora.aux_losses(model)["expert_similarity"], torch.tensor(1.0))


def test_similarity_compares_samples():
    model = molora_model("llama", "soft-linear", aux_losses={"similarity": 1.0}).train()
    batch = {key: value[:1].expand(3, -1).clone() for key, value in batch_for("llama").items()}
    model(**batch)
    assert molora.aux_losses(model)["similarity"] < 1e-8, "equal samples route alike and look alike"


def test_loss_free_balance_moves_towards_what_is_used_less():
    gate = GateConfig(top_k=1, bias=True, balance_rate=0.1, share="linear")
    model = molora_model("llama", gate).train()
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    with torch.no_grad():
        for layer in layers:  # everything goes to the first expert
            layer.molora_gate["default"].bias.set_weight(torch.tensor([30.0, 0.0, 0.0]))
    batch = batch_for("llama")
    for step in range(1, 4):
        model(**batch)
        balance = layers[0].molora_gate["default"].balance
        assert balance[0] < 0 < balance[1], f"step {step}"
    kept = balance.clone()
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert torch.equal(layers[0].molora_gate["default"].balance, kept), "only training forwards move it"


RESTRICTED = {
    "one task": {"tasks": {"a": ["expert_0", "expert_1"]}, "routed": {"task_ids": "a", "by": "task"}},
    "always on": {"always_on": {"expert_2": "rest"}},
}


@pytest.mark.parametrize("name", RESTRICTED)
def test_loss_free_balance_moves_only_experts_that_were_a_choice(name):
    options = dict(RESTRICTED[name])
    route = options.pop("routed", {})
    model = molora_model("llama", GateConfig(top_k=1, balance_rate=0.1, share="linear"), **options).train()
    with molora.routing(model, **route):
        model(**batch_for("llama"))
    gates = [m.molora_gate["default"] for m in model.modules() if isinstance(m, MoLoraLayer)]
    assert all(gate.balance[2] == 0 for gate in gates)
    assert any(gate.balance[:2].any() for gate in gates)


def test_loss_free_balance_is_not_rounded_on_a_16_bit_base():
    model = molora_model("llama", GateConfig(top_k=2, balance_rate=0.001), dtype=torch.bfloat16)
    gate = next(m for m in model.modules() if isinstance(m, MoLoraLayer)).molora_gate["default"]
    gate.balance.fill_(0.6)
    for _ in range(100):
        gate.move_balance(torch.tensor([1 / 3, -1 / 6, -1 / 6]))
    model.to(torch.bfloat16)
    assert_close(gate.balance, torch.tensor([0.7, 0.5, 0.5]), atol=1e-5, rtol=0)


def test_loss_free_balance_chooses_but_does_not_weight():
    from molora.gates.selection import How, softmax, top_k

    def weights_of(k, renorm, balance=None):
        return top_k(scores, How(GateConfig(), softmax, k, renorm, balance=balance))

    scores = torch.tensor([[2.0, 1.0, 0.0]])
    probs = scores.softmax(-1)
    weights = weights_of(1, "none", torch.tensor([-1.0, 0.0, 0.0]))
    assert_close(weights, torch.tensor([[0.0, probs[0, 1].item(), 0.0]]))
    for k in (1, 2, 3):
        renorm = "sum" if k > 1 else "none"
        assert_close(weights_of(k, renorm, torch.zeros(3)), weights_of(k, renorm))

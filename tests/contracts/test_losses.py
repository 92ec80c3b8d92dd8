"""I11: every auxiliary loss has its documented value, reaches the gate, ignores padding and depth."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig, MoLoraConfig, losses
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, batch_for, config_for, gradients, molora_model


def gate_modules(model):
    return [
        m.molora_gate["default"]
        for m in model.modules()
        if isinstance(m, MoLoraLayer) and "default" in m.molora_gate
    ]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_at_uniform_whatever_k_and_larger_at_collapse(k):
    probs = torch.full((8, 4), 0.25)
    spread = torch.stack([torch.roll(torch.eye(4)[:k].sum(0) / k, i % 4) for i in range(8)])
    assert_close(losses.balance(probs, spread), torch.tensor(1.0))
    collapsed = torch.eye(4)[:1].expand(8, 4) * 0.97 + 0.01
    assert losses.balance(collapsed, torch.eye(4)[:1].expand(8, 4)) > 3.5


def test_z_is_the_mean_squared_log_partition():
    assert_close(losses.z(torch.zeros(5, 4)), torch.tensor(4.0).log().square())


@pytest.mark.parametrize("norm", ["l1", "squared"])
def test_orthogonal_equals_the_double_loop(norm):
    new, old = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    naive = sum(abs(a @ b) if norm == "l1" else (a @ b) ** 2 for a in old for b in new)
    assert_close(losses.orthogonal(new, old, norm), naive)
    complement = torch.linalg.qr(torch.cat([old, new]).t()).Q.t()[5:8]
    assert losses.orthogonal(complement, old, norm) < 1e-20 if norm == "squared" else 1e-12
    old.requires_grad_(True)
    new.requires_grad_(True)
    losses.orthogonal(new, old, norm).backward()
    assert old.grad is None
    residual = new.grad - new.grad @ torch.linalg.pinv(old.detach()) @ old.detach()
    assert residual.abs().max() < 1e-10, "its gradient lies in the span of the old rows"


def test_masked_tokens_do_not_count():
    logits, mask = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    probs = logits.softmax(-1)
    assert_close(losses.balance(probs, probs, mask), losses.balance(probs[mask], probs[mask]))
    assert_close(losses.z(logits, mask), losses.z(logits[mask]))
    assert losses.z(logits, torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("gate", ["constant-linear", "constant-global", "task-table"])
def test_z_is_refused_where_a_gate_reads_nothing(gate):
    with pytest.raises(ConfigError, match="meaningless on a"):
        config_for("llama", gate, aux_losses={"z": 1.0})


@pytest.mark.parametrize("gate", ["top1-linear", "top2-block", "topcut-group"])
def test_padding_changes_no_loss(gate):
    model = molora_model("llama", gate, aux_losses={"balance": 1.0, "z": 1.0}).train()
    batch = batch_for("llama")
    model(**batch)
    expected = molora.aux_losses(model)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 4), value=-100),
    }
    model(**padded)
    for name, value in molora.aux_losses(model).items():
        assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def test_out_loss_contains_the_weighted_losses_in_training_only():
    batch = batch_for("llama")
    plain = molora_model("llama").train()(**batch).loss
    model = molora_model("llama", aux_losses={"balance": 0.5, "z": 0.25}).train()
    loss = model(**batch).loss
    values = molora.aux_losses(model)
    assert_close(loss, plain + 0.5 * values["balance"] + 0.25 * values["z"])
    assert_close(molora.aux_loss(model), loss - plain, atol=1e-6, rtol=1e-6)
    with molora.aux_in_loss(model, False):
        assert_close(model(**batch).loss, plain)
    assert_close(model.eval()(**batch).loss, plain)
    silent = molora_model("llama", aux_losses={"balance": 0.5}, add_aux_to_loss=False).train()
    assert_close(silent(**batch).loss, plain)
    assert molora.aux_loss(silent) > 0


def test_a_value_does_not_grow_with_depth():
    short, tall = (molora_model("llama", "soft-group", aux_losses={"balance": 1.0}) for _ in range(2))
    for model, kept in ((short, 1), (tall, 2)):
        for gate in gate_modules(model):
            weight = gate.rows.weight.detach()
            gate.rows.assign(torch.zeros_like(weight), [[0, 1, 2]], [False] * 3)
        model.base_model.model.model.layers = model.base_model.model.model.layers[:kept]
        model.base_model.context.forget_modules()
        model.train()(**batch_for("llama"))
        assert_close(molora.aux_losses(model)["balance"], torch.tensor(1.0))


def test_orthogonal_reaches_only_the_new_expert():
    model = molora_model("llama", aux_losses={"orthogonal": {"coefficient": 1.0, "norm": "squared"}})
    model.train()(**batch_for("llama"))
    assert molora.aux_losses(model)["orthogonal"] == 0  # nothing frozen yet
    model.add_expert("late")
    model.train()(**batch_for("llama"))
    value = molora.aux_losses(model)["orthogonal"]
    banks = [m.molora_experts["default"] for m in model.modules() if isinstance(m, MoLoraLayer)]
    per_layer = [
        ((b.stacks["A"].frozen.flatten(0, 1) @ b.stacks["A"].trainable.flatten(0, 1).t()) ** 2).sum()
        for b in banks
    ]
    assert_close(value, torch.stack(per_layer).mean())
    value.backward()
    assert set(gradients(model)) == {
        n for n, _ in model.named_parameters() if n.endswith("molora_experts.default.stacks.A.lora_A")
    }


@pytest.mark.parametrize(
    ("gate", "aux", "message"),
    [
        ("task-group", {"balance": 1.0}, "needs a gate that learns"),
        ("task-group", {"z": 1.0}, "needs a gate that learns"),
        ("top2-group", {"balanse": 1.0}, "Did you mean 'balance'"),
        ("top2-group", {"balance": {"norm": "l1", "coefficient": 1}}, "not a setting"),
        ("top2-group", {"balance": "much"}, "must be a number"),
    ],
)
def test_losses_that_cannot_work_are_refused(gate, aux, message):
    with pytest.raises(ConfigError, match=message):
        config_for("llama", gate, aux_losses=aux)


def test_losses_before_any_training_forward_are_an_error():
    model = molora_model("llama", aux_losses={"balance": 1.0})
    with pytest.raises(molora.RoutingError, match="train mode"):
        molora.aux_losses(model)
    assert molora.aux_losses(molora_model("llama")) == {}
    assert base_model("llama") is not None


def test_contrastive_leaves_out_experts_that_write_nothing_yet():
    outputs = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    expert = torch.tensor([0, 0, 1, 2, 2])
    found = losses.contrastive(outputs, expert)
    assert_close(found, losses.contrastive(outputs[:3], expert[:3]))
    found.backward()
    assert outputs.grad[:3].abs().max() < 100 and not outputs.grad[3:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_losses": {"contrastive": 1}, "combine": "factors", "gate": {"kind": "constant"}}, "factors there are none"),
        ({"aux_losses": {"contrastive": 1}, "ffn_targets": ["up_proj"]}, "ffn_targets there are none"),
        ({"aux_losses": {"contrastive": {"coefficient": 1, "temperature": 0}}}, "must be positive"),
        ({"aux_losses": {"orthogonal": 1}, "share_A": True}, "with share_A there is one"),
        ({"aux_losses": {"expert_similarity": 1}, "share_A": True}, "use B"),
        ({"gate": {"noise": "gaussian", "noise_std": 0.0}}, "is no noise"),
    ],
)  # fmt: skip
def test_losses_with_nothing_to_act_on_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoLoraConfig(num_experts=3, **options)


@pytest.mark.parametrize("loss", ["similarity", "contrastive", "balance"])
def test_a_mask_of_the_response_reads_the_response(loss):
    batch = batch_for("llama", batch=4, seq=12)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :8] = -100
    values = []
    for mask in ("padding", "response"):
        model = molora_model("llama", aux_losses={loss: {"coefficient": 1.0, "mask": mask}}).train()
        model(**batch)
        values.append(molora.aux_losses(model)[loss].item())
    assert values[0] != values[1]


def test_contrastive_compares_gated_experts_of_mixtures_only():
    values = {}
    for name, options in {
        "all": {},
        "with a plain LoRA": {"plain_targets": ["q_proj"], "target_modules": ["k_proj", "v_proj"]},
        "with one always on": {"always_on": {"expert_2": 5.0}},
    }.items():
        model = molora_model("llama", "top2-group", aux_losses={"contrastive": 1.0}, **options).train()
        model(**batch_for("llama", batch=4, seq=16))
        values[name] = molora.aux_losses(model)["contrastive"].item()
    assert min(values.values()) > 3, values


def test_every_output_with_a_loss_gets_the_auxiliary_losses():
    from transformers import BertConfig, BertForQuestionAnswering

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    settings = MoLoraConfig(
        num_experts=3, target_modules=["query", "value"], aux_losses={"z": 1.0}, gate=GateConfig()
    )
    model = get_peft_model(BertForQuestionAnswering(config), settings).train()
    batch = {
        "input_ids": torch.randint(0, 50, (2, 6)),
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    }
    torch.manual_seed(0)
    whole = model(**batch).loss
    with molora.routing(model):
        settings = model.peft_config["default"]
        settings.add_aux_to_loss = False
        torch.manual_seed(0)
        alone = model(**batch).loss
    assert_close(whole - alone, molora.aux_losses(model)["z"])

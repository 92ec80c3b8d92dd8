"""I1-I7, I9, I10, I12, I13, I15 of the design, for every gate, sharing and architecture that owes them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

import molora
from molora import MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from tests.zoo import (
    ARCHITECTURES,
    CAUSAL,
    GATES,
    HARD,
    LEARNED,
    SHARED,
    SUM_TO_ONE,
    TASK_TYPES,
    TASKS,
    TOKEN,
    base_model,
    batch_for,
    beyond,
    config_for,
    gradients,
    molora_model,
    pairs,
    randomise,
    routed,
)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
# What is seen at once: every gate on Llama, and each invariant on at most one other architecture.
LLAMA, CONV1D, ENCODER, ENCODER_DECODER = ("llama",), CAUSAL, ("llama", "bert"), ("llama", "t5")


def features_for(gate):
    return routed(gate).get("routing_features")


def layers(model):
    return [m for m in model.modules() if isinstance(m, MoLoraLayer)]


def banks(model):
    return [layer.molora_experts["default"] for layer in layers(model)]


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, fast=ENCODER))
def test_I1_zero_B_leaves_logits_bit_equal(architecture, gate):
    base, batch = base_model(architecture), batch_for(architecture)
    expected = base(**batch).logits
    model = molora_model(architecture, gate, trained=False)
    for training in (False, True):
        model.train(training)
        assert torch.equal(model(**batch, **routed(gate)).logits, expected)


@pytest.mark.parametrize(("architecture", "gate"), pairs(SUM_TO_ONE, fast=LLAMA))
def test_I2_equal_experts_make_the_gate_irrelevant(architecture, gate):
    model = molora_model(architecture, gate)
    for bank in banks(model):
        bank.assign([bank.expert(0)] * 3, [False] * 3)
    batch = batch_for(architecture)
    before = model(**batch, **routed(gate)).logits
    with molora.routing(model, experts=["expert_2"]):
        assert_close(before, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", beyond(ARCHITECTURES, *CONV1D))
@pytest.mark.parametrize("gate", ["soft-linear", "top1-linear", "constant-global", "task-group"])
def test_I3_one_expert_is_peft_lora(architecture, gate):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": TASK_TYPES[architecture]}
    reference = get_peft_model(base_model(architecture, dtype=torch.float64), LoraConfig(**options))
    model = molora_model(
        architecture, gate, dtype=torch.float64, num_experts=1, tasks=[TASKS[0]], r=4,
    )  # fmt: skip
    weights = {name: m for name, m in reference.named_modules() if hasattr(m, "lora_A")}
    for layer in layers(model):
        lora = weights["base_model.model." + layer.mounts["default"].key]
        expert = layer.molora_experts["default"].expert(0)
        with torch.no_grad():
            lora.lora_A["default"].weight.copy_(expert.A)
            lora.lora_B["default"].weight.copy_(expert.B)
    batch = batch_for(architecture)
    ids = {"routing_task_ids": [TASKS[0]] * 3} if gate.startswith("task") else {}
    expected, actual = reference(**batch), model(**batch, **ids)
    assert_close(actual.logits, expected.logits, atol=1e-10, rtol=1e-10)
    expected.loss.backward()
    actual.loss.backward()
    for layer in layers(model):
        lora, bank = (
            weights["base_model.model." + layer.mounts["default"].key],
            layer.molora_experts["default"],
        )
        assert_close(
            bank.stacks["A"].trainable.grad[0], lora.lora_A["default"].weight.grad, atol=1e-9, rtol=1e-9
        )
        assert_close(
            bank.stacks["B"].trainable.grad[0].t(), lora.lora_B["default"].weight.grad, atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, fast=LLAMA))
def test_I4_permuting_experts_with_gate_rows_changes_nothing(architecture, gate):
    model, batch = molora_model(architecture, gate, dtype=torch.float64), batch_for(architecture)
    expected = model(**batch, **routed(gate)).logits
    order = [2, 0, 1]
    own = {task: [f"expert_{i}"] for i, task in enumerate(TASKS)}
    tasks = SHARED if gate.startswith("task") and gate not in HARD else own
    renamed = config_for(architecture, gate, expert_names=[f"expert_{i}" for i in order], tasks=tasks)
    permuted = get_peft_model(base_model(architecture, dtype=torch.float64), renamed).eval()
    for layer, other in zip(layers(model), layers(permuted), strict=True):
        experts = layer.molora_experts["default"].experts()
        other.molora_experts["default"].assign([experts[i] for i in order], [False] * 3)
        if "default" in layer.molora_gate:
            gate_module, other_gate = layer.molora_gate["default"], other.molora_gate["default"]
            other_gate.load_state_dict(gate_module.state_dict())
            if gate == "task-table":  # a row per task, a column per expert
                table = gate_module.tasks.weight.detach()[:, order]
                other_gate.tasks.assign(table, other_gate.tasks.order, [False] * 3)
            for rows, others in zip(gate_module.grown, other_gate.grown, strict=True):
                others.assign(rows.weight.detach()[order], [[0, 1, 2]], [False] * 3)
    if architecture == "bert":
        permuted.base_model.model.classifier.load_state_dict(model.base_model.model.classifier.state_dict())
    assert_close(permuted(**batch, **routed(gate)).logits, expected, atol=1e-9, rtol=1e-9)


@architectures
@pytest.mark.parametrize("gate", ["constant-linear", "constant-global"])
def test_I5_a_saturated_gate_is_that_expert_alone(architecture, gate):
    model, batch = molora_model(architecture, gate, dtype=torch.float64), batch_for(architecture)
    saturated = torch.tensor([0.0, 200.0, 0.0], dtype=torch.float64)
    for layer in layers(model):
        if "default" in layer.molora_gate:
            layer.molora_gate["default"].rows.assign(saturated, [[0, 1, 2]], [False] * 3)
    actual = model(**batch).logits
    with molora.routing(model, experts=["expert_1"]):
        assert_close(actual, model(**batch).logits, atol=1e-9, rtol=1e-9)


@architectures
@pytest.mark.parametrize("gate", ["task-group", "task-global"])
def test_I5_a_task_gate_is_that_expert_alone(architecture, gate):
    model, batch = molora_model(architecture, gate), batch_for(architecture)
    mixed = model(**batch, routing_task_ids=["gamma", "alpha", "beta"]).logits
    for row, expert in enumerate(["expert_2", "expert_0", "expert_1"]):
        with molora.routing(model, experts=[expert]):
            assert_close(mixed[row], model(**batch).logits[row], atol=1e-5, rtol=1e-5)


@architectures
def test_I6_top_k_of_all_experts_is_dense(architecture):
    dense = molora_model(architecture, "soft-group", dtype=torch.float64)
    top = molora_model(architecture, "top3-group", dtype=torch.float64)
    batch = batch_for(architecture)
    assert_close(top(**batch).logits, dense(**batch).logits, atol=1e-9, rtol=1e-9)


# As each is used; bert reads its first token, so it never pads there.
SIDES = {"llama": ("left", "right"), "gpt2": ("left",), "bert": ("right",), "t5": ("right",)}


@pytest.mark.parametrize(
    ("architecture", "gate", "padding"),
    [
        (a, gate, side)
        if a in ENCODER_DECODER and side == SIDES[a][0]
        else pytest.param(a, gate, side, marks=pytest.mark.slow)
        for a, gate in pairs(GATES)
        for side in SIDES[a]
    ],
)
def test_I7_a_row_alone_is_the_row_in_a_batch(architecture, gate, padding):
    model, batch = molora_model(architecture, gate), batch_for(architecture, padding=padding)
    if architecture in ("bert", "gpt2"):  # their absolute positions must not count the pads
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = model(**batch, **routed(gate)).logits
    for row in range(3):
        keep = batch["attention_mask"][row].bool()
        alone = {key: batch[key][row : row + 1, keep] for key in ("input_ids", "attention_mask")}
        if architecture != "bert":
            alone["labels"] = batch["labels"][row : row + 1, ... if architecture == "t5" else keep]
        logits = model(**alone, **routed(gate, [row])).logits[0]
        expected = together[row] if architecture in ("bert", "t5") else together[row][keep]
        assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, architectures=CAUSAL, fast=LLAMA))
def test_I7_a_prefix_does_not_see_the_future(architecture, gate):
    model, batch = molora_model(architecture, gate), batch_for(architecture)
    ids = batch["input_ids"]
    prompt = torch.arange(7).expand(3, -1) < torch.tensor(
        [[1], [2], [4]]
    )  # what gates over sequences may pool
    whole = model(input_ids=ids, routing_prompt_mask=prompt, **routed(gate)).logits[:, :4]
    start = model(input_ids=ids[:, :4], routing_prompt_mask=prompt[:, :4], **routed(gate)).logits
    assert_close(start, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, fast=LLAMA))
def test_I8_train_mode_without_noise_is_eval(architecture, gate):
    model, batch = molora_model(architecture, gate), batch_for(architecture)
    expected = model(**batch, **routed(gate)).logits
    assert torch.equal(model.train()(**batch, **routed(gate)).logits, expected)


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, fast=LLAMA))
def test_I10_adding_an_expert_keeps_task_routed_logits_bit_equal(architecture, gate):
    model, batch, features = molora_model(architecture, gate), batch_for(architecture), features_for(gate)
    before = {}
    for task in TASKS:
        with molora.routing(model, task, by="task", features=features):
            before[task] = model(**batch).logits
    experts = [bank.experts() for bank in banks(model)]
    model.add_expert("late", tasks=["delta"])
    randomise_new(model)
    for task in TASKS:
        with molora.routing(model, task, by="task", features=features):
            assert torch.equal(model(**batch).logits, before[task])
    for bank, old in zip(banks(model), experts, strict=True):
        for i, expert in enumerate(old):
            assert torch.equal(bank.expert(i).A, expert.A) and torch.equal(bank.expert(i).B, expert.B)
    extra = {**routed(gate), "routing_task_ids": ["delta"] * 3}
    model.train()(**batch, **extra).loss.backward()
    assert gradients(model)
    for name in gradients(model):
        assert "lora_A" in name or "lora_B" in name or "block_1" in name, name


@torch.no_grad()
def randomise_new(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "molora_gate" in name):
            parameter.normal_(std=0.3)


@pytest.mark.parametrize(("architecture", "gate"), pairs(TOKEN, fast=LLAMA))
def test_I10_old_router_logits_stay_bit_equal(architecture, gate):
    model = molora_model(architecture, gate)
    gates = [layer.molora_gate["default"] for layer in layers(model) if "default" in layer.molora_gate]
    widths = [(g.rows.blocks[0] if g.hidden is None else g.hidden.weight).shape[1] for g in gates]
    inputs = [torch.randn(5, width) for width in widths]
    before = [g(x).logits for g, x in zip(gates, inputs, strict=True)]
    model.add_expert("late")
    for g, x, logits in zip(gates, inputs, before, strict=True):
        assert torch.equal(g(x).logits[:, :3], logits)


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, fast=CONV1D))
def test_I12_one_task_and_mixed_batches_agree(architecture, gate):
    batch, features = batch_for(architecture), features_for(gate)
    tasks = {
        "alpha": ["expert_0", "expert_2"],
        "beta": {"expert_1": 0.7, "expert_2": 0.3},
        "gamma": ["expert_1"],
    }
    model = molora_model(architecture, gate, tasks=tasks)
    with molora.routing(model, by="task", features=features):
        mixed = model(**batch, routing_task_ids=list(TASKS)).logits
        for row, task in enumerate(TASKS):
            single = model(**batch, routing_task_ids=task).logits
            assert_close(single[row], mixed[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", beyond(ARCHITECTURES, *ENCODER_DECODER))
@pytest.mark.parametrize("gate", ["constant-linear", "constant-global", "task-group", "task-global"])
def test_I13_merging_a_static_mixture_is_the_mixture(architecture, gate):
    model, batch = molora_model(architecture, gate, dtype=torch.float64), batch_for(architecture)
    by_task = {"task": "beta"} if gate.startswith("task") else {}
    ids = {"routing_task_ids": ["beta"] * 3} if gate.startswith("task") else {}
    expected = model(**batch, **ids).logits
    merged = copy.deepcopy(model).merge_and_unload(**by_task)
    assert not layers(merged)
    assert_close(merged(**batch).logits, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("architecture", "gate"), pairs(LEARNED, fast=ENCODER))
def test_I15_gate_stays_float32_under_autocast(architecture, gate):
    aux = {"balance": 0.1} if gate.startswith(("constant", "task-table")) else {"balance": 0.1, "z": 0.1}
    model = molora_model(architecture, gate, aux_losses=aux).train()
    batch = batch_for(architecture)
    seen = []
    for layer in layers(model):
        if "default" in layer.molora_gate:
            layer.molora_gate["default"].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, **routed(gate))
        assert all(value.dtype == torch.float32 for value in molora.aux_losses(model).values())
    assert seen and all(r.weights.dtype == r.logits.dtype == torch.float32 for r in seen)
    out.loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
        if p.grad is not None
    )


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, fast=ENCODER))
def test_base_only_rows_are_bit_equal_to_the_base(architecture, gate):
    base, batch = base_model(architecture), batch_for(architecture)
    expected = base(**batch).logits
    model = molora_model(architecture, gate)
    mixed = model(**batch, **{**routed(gate), "routing_task_ids": ["alpha", None, -1]}).logits
    assert torch.equal(mixed[1:], expected[1:]) and not torch.equal(mixed[0], expected[0])
    nobody = {**routed(gate), "routing_task_ids": torch.tensor([-1, -1, -1])}
    assert torch.equal(model(**batch, **nobody).logits, expected)


def test_every_config_field_is_documented_or_kept_by_the_verbs():
    text = MoLoraConfig.__doc__ or ""
    own = set(MoLoraConfig.__dataclass_fields__) - {
        f for parent in MoLoraConfig.__mro__[1:] for f in getattr(parent, "__dataclass_fields__", {})
    }
    assert not [name for name in own - {"bias"} if name not in text]


@pytest.mark.parametrize("gate", GATES)
def test_randomise_really_changes_the_output(gate):
    model, batch = molora_model("llama", gate, trained=False), batch_for("llama")
    before = model(**batch, **routed(gate)).logits
    randomise(model)
    assert not torch.allclose(model(**batch, **routed(gate)).logits, before, atol=1e-2)

"""The invariants for mixtures beyond a gate over outputs: factors, shared A, always-on, by layer, feed-forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig
from molora.tuner.layer import MoLoraLayer
from tests.zoo import (
    ARCHITECTURES,
    CAUSAL,
    FEED_FORWARD,
    MIXTURES,
    MIXTURES_ON,
    TASKS,
    base_model,
    batch_for,
    given,
    gradients,
    mixture,
    molora_model,
    pairs,
)

mixtures = pytest.mark.parametrize("name", MIXTURES)
AVERAGED = tuple(name for name in MIXTURES if name.startswith("ffn"))
OTHERWISE = (
    "layernorm",
    "identity",
    "by-layer-top2",
    "universal-task",
    "by-layer-task",
    "cores",
)  # weights or factors differ
SUM_TO_ONE = tuple(name for name in MIXTURES if not name.startswith(OTHERWISE))
# What is seen at once: every mixture on Llama, and each invariant on at most one other architecture.
CONV1D, ENCODER, ENCODER_DECODER = CAUSAL, ("llama", "bert"), ("llama", "t5")


def pairs_of(names, fast=("llama",), architectures=ARCHITECTURES):
    return pytest.mark.parametrize(
        ("architecture", "name"), pairs(names, MIXTURES_ON, architectures, fast=fast)
    )


def layers(model):
    return [m for m in model.modules() if isinstance(m, MoLoraLayer)]


@pytest.mark.parametrize("gate", [{"top_k": 2}, {"select": "hard"}, {"select": "dense"}])
def test_whole_feed_forwards_with_an_expert_that_is_always_on_average_to_the_base(gate):
    options = {
        "num_experts": 4,
        "target_modules": FEED_FORWARD,
        "ffn_targets": FEED_FORWARD,
        "trained": False,
    }
    model = molora_model("llama", GateConfig(**gate), always_on={"expert_2": 0.5}, **options)
    batch = batch_for("llama")
    assert_close(model(**batch).logits, base_model("llama")(**batch).logits, atol=1e-5, rtol=1e-5)


def test_one_expert_of_several_keeps_its_probability_where_other_blocks_choose_two():
    model = molora_model("llama", GateConfig(top_k=[1, 2], share="linear")).train()
    model(**batch_for("llama")).loss.backward()
    for block in ("layers.0.", "layers.1."):
        assert any(g.any() for n, g in gradients(model).items() if "molora_gate" in n and block in n), block


def tasks_of(model):
    return list(model.peft_config["default"].task_ids)


@pairs_of(MIXTURES, ENCODER)
def test_I1_zero_B_leaves_the_base(architecture, name):
    base, batch = base_model(architecture), batch_for(architecture)
    expected = base(**batch).logits
    model = mixture(architecture, name, trained=False)
    for training in (False, True):
        actual = model.train(training)(**batch, **given(name)).logits
        if name in AVERAGED:  # several copies of the frozen feed-forward are averaged
            assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(actual, expected)


@pairs_of(SUM_TO_ONE)
def test_I2_equal_experts_make_the_gate_irrelevant(architecture, name):
    model, batch = mixture(architecture, name, dtype=torch.float64), batch_for(architecture)
    for layer in layers(model):
        bank = layer.molora_experts["default"]
        bank.assign([bank.expert(0)] * bank.num_experts, [False] * bank.num_experts)
    before = model(**batch, **given(name)).logits
    with molora.routing(model, experts=["expert_0"]):
        assert_close(before, model(**batch).logits, atol=1e-9, rtol=1e-9)


@pairs_of(MIXTURES, CONV1D)
def test_I3_one_expert_forced_is_that_expert_merged(architecture, name):
    model, batch = mixture(architecture, name, dtype=torch.float64), batch_for(architecture)
    task = "alpha" if name.startswith("cores") else None  # whose core stands before the expert
    with molora.routing(model, task, experts=["expert_1"]):
        forced = model(**batch).logits
    merged = copy.deepcopy(model).merge_and_unload(expert_weights={"expert_1": 1.0}, task=task)
    assert_close(merged(**batch).logits, forced, atol=1e-9, rtol=1e-9)


@pairs_of([name for name in MIXTURES if not name.startswith("by-")])
def test_I4_permuting_experts_with_their_rows_changes_nothing(architecture, name):
    model, batch = mixture(architecture, name, dtype=torch.float64), batch_for(architecture)
    expected, order = model(**batch, **given(name)).logits, [2, 0, 1]
    names = model.peft_config["default"].expert_names
    permuted = mixture(
        architecture, name, dtype=torch.float64, expert_names=[names[i] for i in order],
        tasks=model.peft_config["default"].tasks,
    )  # fmt: skip
    permuted.base_model.model.load_state_dict(
        {k: v for k, v in model.base_model.model.state_dict().items() if "molora" not in k}, strict=False
    )
    for layer, other in zip(layers(model), layers(permuted), strict=True):
        bank, twin = layer.molora_experts["default"], other.molora_experts["default"]
        twin.assign([bank.expert(i) for i in order], [False] * 3)
        if bank.cores is not None:
            twin.cores.load_state_dict(bank.cores.state_dict())
        if "default" not in layer.molora_gate:
            continue
        gate, its = layer.molora_gate["default"], other.molora_gate["default"]
        its.load_state_dict(gate.state_dict())
        for rows, others in zip(gate.grown, its.grown, strict=True):
            others.set_weight(rows.weight.detach()[order])
        if gate.tasks is not None:  # a row per task, columns of experts in each split
            table = gate.tasks.weight.detach().unflatten(1, (-1, 3))[..., order].flatten(1)
            its.tasks.set_weight(table)
    assert_close(permuted(**batch, **given(name)).logits, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("name", ["blend-top2", "blend-soft"])
def test_I7_a_prefix_does_not_see_the_future(architecture, name):
    model, batch = mixture(architecture, name), batch_for(architecture)
    ids = batch["input_ids"]
    prompt = torch.arange(7).expand(3, -1) < torch.tensor([[1], [2], [4]])
    whole = model(input_ids=ids, routing_prompt_mask=prompt).logits[:, :4]
    start = model(input_ids=ids[:, :4], routing_prompt_mask=prompt[:, :4]).logits
    assert_close(start, whole, atol=2e-5, rtol=1e-4)


@pairs_of(MIXTURES, ENCODER_DECODER)
def test_I7_a_row_alone_is_the_row_in_a_batch(architecture, name):
    padding = None if architecture == "bert" else "right"
    model, batch = mixture(architecture, name), batch_for(architecture, padding=padding)
    together = model(**batch, **given(name)).logits
    for row in range(3):
        keep = batch["attention_mask"][row].bool()
        alone = {key: batch[key][row : row + 1, keep] for key in ("input_ids", "attention_mask")}
        if architecture != "bert":
            alone["labels"] = batch["labels"][row : row + 1, ... if architecture == "t5" else keep]
        logits = model(**alone, **given(name, [row])).logits[0]
        expected = together[row] if architecture in ("bert", "t5") else together[row][keep]
        assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pairs_of(MIXTURES)
def test_I8_train_mode_is_eval_and_a_cache_changes_nothing(architecture, name):
    model, batch = mixture(architecture, name), batch_for(architecture)
    expected = model(**batch, **given(name)).logits
    assert torch.equal(model.train()(**batch, **given(name)).logits, expected)
    if architecture == "bert":
        return
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **given(name)}
    model.eval()
    cached = model.generate(**prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))


@pairs_of(MIXTURES)
def test_I9_saved_and_loaded_is_bit_equal(architecture, name, tmp_path):
    model, batch = mixture(architecture, name), batch_for(architecture)
    model.train()(**batch, **given(name)).loss.backward()  # moves what moves in training alone
    expected = model.eval()(**batch, **given(name)).logits
    molora.save(model, tmp_path / "adapter")
    again = molora.load(base_model(architecture), tmp_path / "adapter")
    assert torch.equal(again(**batch, **given(name)).logits, expected)
    assert again.peft_config["default"].to_dict()["gate"] == model.peft_config["default"].to_dict()["gate"]


@pairs_of(MIXTURES)
def test_I10_growing_keeps_task_routed_logits_bit_equal(architecture, name):
    model, batch = mixture(architecture, name), batch_for(architecture)
    features = given(name).get("routing_features")
    before = {}
    for task in tasks_of(model):
        with molora.routing(model, task, by="task", features=features):
            before[task] = model(**batch).logits
    model.add_expert("late", tasks=["delta"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in key or "molora_gate" in key):
                parameter.normal_(std=0.3)
    for task, expected in before.items():
        with molora.routing(model, task, by="task", features=features):
            assert torch.equal(model(**batch).logits, expected), task
    extra = {**given(name), "routing_task_ids": ["delta"] * 3}
    model.train()(**batch, **extra).loss.backward()
    assert gradients(model)
    for key in gradients(model):
        assert "lora_A" in key or "lora_B" in key or "block_1" in key, key
    if name == "balanced-top2":  # training moved its balance
        return
    model.remove_expert("late", drop_tasks=True)
    for task, expected in before.items():
        with molora.routing(model, task, by="task", features=features):
            assert torch.equal(model.eval()(**batch).logits, expected), task


@pairs_of([n for n in MIXTURES if "table" in n or "splits" in n or "task" in n or "constant" in n], CONV1D)
def test_I13_merging_what_does_not_depend_on_x_is_the_mixture(architecture, name):
    model, batch = mixture(architecture, name, dtype=torch.float64), batch_for(architecture)
    task = None if name == "factors-constant" else tasks_of(model)[-1]
    ids = {} if task is None else {"routing_task_ids": [task] * 3}
    expected = model(**batch, **ids).logits
    merged = copy.deepcopy(model).merge_and_unload(**({} if task is None else {"task": task}))
    assert_close(merged(**batch).logits, expected, atol=1e-9, rtol=1e-9)


@pairs_of(MIXTURES, architectures=ENCODER_DECODER)
def test_I14_checkpointing_changes_no_gradient(architecture, name):
    found = []
    for checkpointed in (False, True):
        model, batch = mixture(architecture, name), batch_for(architecture)
        model.double().train()  # in float32 rounding alone comes to more than 1e-6 on some processors
        if checkpointed:
            base = model.base_model.model
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        model(**batch, **given(name)).loss.backward()
        found.append(gradients(model))
    assert set(found[0]) == set(found[1])
    for key, expected in found[0].items():
        assert_close(found[1][key], expected, atol=1e-9, rtol=1e-8)


@mixtures
def test_base_only_rows_are_the_base(name):
    base, batch = base_model("llama"), batch_for("llama")
    expected = base(**batch).logits
    model = mixture("llama", name)
    ids = {**given(name), "routing_task_ids": [tasks_of(model)[0], None, -1]}
    mixed = model(**batch, **ids).logits
    assert_close(mixed[1:], expected[1:], atol=1e-5 if name in AVERAGED else 0, rtol=0)
    assert not torch.allclose(mixed[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_by_layer_a_task_without_experts_there_adds_nothing_there(architecture):
    model, batch = mixture(architecture, "by-layer-task"), batch_for(architecture)
    first, second = (
        [m for m in layers(model) if f".{i}." in m.mounts["default"].key and not m.mounts["default"].plain]
        for i in range(2)
    )
    assert {m.molora_experts["default"].num_experts for m in first} == {2}
    assert {m.molora_experts["default"].num_experts for m in second} == {3}
    with molora.record_routing(model) as record:
        mixed = model(**batch, routing_task_ids=list(TASKS)).logits
    assert set(record.by_task()["gamma"]) == {"expert_0", "expert_1", "expert_2"}
    alone = model(**batch, routing_task_ids="gamma").logits
    assert_close(mixed[2], alone[2], atol=1e-5, rtol=1e-5)


def test_a_list_covers_as_many_blocks_each():
    config = molora.MoLoraConfig(
        num_experts=[2],
        r=[3],
        gate={"kind": "top_k", "top_k": [1], "share": "linear"},
        target_modules="all-linear",
    )
    from peft import get_peft_model

    model = get_peft_model(base_model("llama"), config)
    assert model.peft_config["default"].experts_by_layer == [2, 2]
    assert {m.molora_experts["default"].ranks for m in layers(model)} == {(3, 3)}
    with pytest.raises(ConfigError, match="one per block"):
        config = molora.MoLoraConfig(num_experts=[2, 3, 4], target_modules=["lm_head"])
        get_peft_model(base_model("llama"), config)


def test_two_adapters_cannot_both_be_active_over_a_feed_forward():
    model = mixture("llama", "ffn-top2")
    model.add_adapter("other", molora.MoLoraConfig(num_experts=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="activate one"):
        model(**batch_for("llama"))


def test_a_feed_forward_of_one_linear_is_refused():
    with pytest.raises(ConfigError, match="alone in its block"):
        mixture("llama", "ffn-top2", ffn_targets=["down_proj"])

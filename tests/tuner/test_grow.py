"""add_expert, remove_expert, freeze and unfreeze: names, tasks, ranks, optimisers and saving."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import DynamicCache

import molora
from molora import ConfigError, GateConfig, RoutingError
from molora.tuner.layer import MoLoraLayer
from tests.zoo import GATES, TASKS, base_model, batch_for, gradients, molora_model, routed


def banks(model):
    return [m.molora_experts["default"] for m in model.modules() if isinstance(m, MoLoraLayer)]


def train(model, optimizer, batch, steps=3, **kwargs):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, **kwargs).loss.backward()
        optimizer.step()
    return model.eval()


def test_ids_are_never_reused_and_survive_saving(tmp_path):
    model = molora_model("llama", "task-group")
    model.add_expert("fourth", tasks=["delta"])
    model.remove_expert("fourth", drop_tasks=True)
    model.add_expert("fifth", tasks=["epsilon"])
    assert model.task_ids == {"alpha": 0, "beta": 1, "gamma": 2, "epsilon": 4}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert loaded.task_ids == model.task_ids and loaded.tasks == model.tasks
    loaded.add_expert("sixth", tasks=["zeta"])
    assert loaded.task_ids["zeta"] == 5


@pytest.mark.parametrize("gate", GATES)
def test_a_grown_model_saves_and_reloads_bit_equal(tmp_path, gate):
    model, batch = molora_model("llama", gate, blocks=1), batch_for("llama")
    model.add_expert("late", tasks=["delta"], init="copy:expert_1")
    model.freeze_experts(["expert_0"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama", blocks=1), tmp_path, is_trainable=True)
    assert torch.equal(loaded(**batch, **routed(gate)).logits, model(**batch, **routed(gate)).logits)
    assert loaded.trainable_experts == ["late"] == model.trainable_experts
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_frozen_experts_do_not_move_under_weight_decay_and_a_reused_name():
    model, batch = molora_model("llama", "soft-group"), batch_for("llama")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), batch)
    model.add_expert("late")
    before = [bank.experts()[:3] for bank in banks(model)]
    rows = {n: p.clone() for n, p in model.named_parameters() if n.endswith("block_0")}
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), batch)
    for bank, old in zip(banks(model), before, strict=True):
        for i, expert in enumerate(old):
            assert torch.equal(bank.expert(i).A, expert.A) and torch.equal(bank.expert(i).B, expert.B)
        assert bank.expert(3).B.abs().max() > 0
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in rows.items())


def test_a_copied_expert_is_its_source():
    model, batch = molora_model("llama", "soft-group"), batch_for("llama")
    model.add_expert("twin", init="copy:expert_1")
    with molora.routing(model, experts=["expert_1"]):
        expected = model(**batch).logits
    with molora.routing(model, experts=["twin"]):
        assert_close(model(**batch).logits, expected)
    gate = next(
        m.molora_gate["default"]
        for m in model.modules()
        if isinstance(m, MoLoraLayer) and "default" in m.molora_gate
    )
    assert torch.equal(gate.rows.weight[3], gate.rows.weight[1])


def test_a_mean_expert_is_the_best_low_rank_mean():
    model = molora_model("llama", "soft-group", r=2)
    expected = [sum(e.delta() for e in bank.experts()) / 3 for bank in banks(model)]
    model.add_expert("mean", init="mean")
    for bank, delta in zip(banks(model), expected, strict=True):
        U, S, V = torch.linalg.svd(delta)
        best = U[:, :2] * S[:2] @ V[:2]
        assert_close(bank.expert(3).delta(), best, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", ["top2-group", "task-group", "constant-linear"])
def test_removing_an_expert_leaves_the_others(gate):
    model, batch = molora_model("llama", gate), batch_for("llama")
    with molora.routing(model, experts=["expert_2"]):
        expected = model(**batch).logits
    model.remove_expert("expert_1", drop_tasks=True)
    assert model.expert_names == ["expert_0", "expert_2"]
    with molora.routing(model, experts=["expert_2"]):
        assert_close(model(**batch).logits, expected)
    if gate == "task-group":
        assert "beta" not in model.tasks


def test_remove_refuses_what_would_break_a_task():
    model = molora_model("llama", "task-group")
    with pytest.raises(ConfigError, match="only expert of task 'beta'"):
        model.remove_expert("expert_1")
    for name in ("expert_0", "expert_1"):
        model.remove_expert(name, drop_tasks=True)
    with pytest.raises(ConfigError, match="only expert left"):
        model.remove_expert("expert_2", drop_tasks=True)


def test_freezing_and_unfreezing_keeps_values_and_switches_gradients():
    model, batch = molora_model("llama", "soft-group"), batch_for("llama")
    expected = model(**batch).logits
    model.freeze_experts(["expert_1"])
    assert model.trainable_experts == ["expert_0", "expert_2"]
    assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
    model.train()(**batch).loss.backward()
    assert all("frozen" not in name for name in gradients(model))
    model.unfreeze_experts("expert_1")
    assert model.trainable_experts == ["expert_0", "expert_1", "expert_2"]
    assert_close(model.eval()(**batch).logits, expected, atol=1e-6, rtol=1e-5)


def test_an_isolated_expert_is_invisible_to_older_tasks():
    model, batch = molora_model("llama", "soft-group"), batch_for("llama")
    before = model(**batch, routing_task_ids="alpha").logits
    model.add_expert("late", tasks=["delta"], isolate=True, init="copy:expert_2")
    assert_close(model(**batch, routing_task_ids="alpha").logits, before, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(model(**batch, routing_task_ids="delta").logits, before, atol=1e-3)


def test_plain_targets_get_one_lora_beside_the_experts():
    model = molora_model(
        "llama", "top2-group", plain_targets=["o_proj", "down_proj"], target_modules=["q_proj", "up_proj"]
    )
    sites = {
        m.mounts["default"].key.rsplit(".", 1)[-1]: m for m in model.modules() if isinstance(m, MoLoraLayer)
    }
    assert {name: layer.molora_experts["default"].num_experts for name, layer in sites.items()} == {
        "q_proj": 3, "o_proj": 1, "up_proj": 3, "down_proj": 1,
    }  # fmt: skip
    assert not sites["o_proj"].molora_gate
    model.add_expert("late")
    assert not any(p.requires_grad for p in sites["o_proj"].molora_experts.parameters())


def test_ranks_by_pattern_and_by_block_and_by_expert(tmp_path):
    model = molora_model(
        "llama", r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6}, use_rslora=True
    )
    by_name = {
        m.mounts["default"].key: m.molora_experts["default"]
        for m in model.modules()
        if isinstance(m, MoLoraLayer)
    }
    q, o = by_name["model.layers.0.self_attn.q_proj"], by_name["model.layers.0.self_attn.o_proj"]
    assert q.ranks == (2, 2, 2) and o.ranks == (4, 4, 4)
    assert q.scalings[0] == pytest.approx(6 / 2**0.5) and o.scalings[0] == pytest.approx(8 / 4**0.5)
    listed = molora_model("llama", r=[2, 6])
    ranks = {
        m.mounts["default"].key: m.molora_experts["default"].ranks[0]
        for m in listed.modules()
        if isinstance(m, MoLoraLayer)
    }
    assert ranks["model.layers.0.mlp.up_proj"] == 2 and ranks["model.layers.1.mlp.up_proj"] == 6
    with pytest.raises(ConfigError, match="rank_pattern: r already gives ranks"):
        molora_model("llama", r={"q_proj": 2}, rank_pattern={"k_proj": 3})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add_expert("expert_0"), "already"),
        (lambda m: m.add_expert("../x"), "not allowed"),
        (lambda m: m.add_expert("x", init="copy:expert_9"), "Did you mean"),
        (lambda m: m.add_expert("x", init="fresh"), "is not one of"),
        (lambda m: m.remove_expert("nobody"), "no expert 'nobody'"),
        (lambda m: m.freeze_experts(["expert_7"]), "no expert"),
        (lambda m: m.add_expert("x", adapter_name="other"), "no adapter 'other'"),
    ],
)
def test_bad_calls_say_what_is_allowed_and_change_nothing(call, message):
    model = molora_model("llama")
    with pytest.raises(ConfigError, match=message):
        call(model)
    assert model.expert_names == ["expert_0", "expert_1", "expert_2"] and model.task_ids == {
        t: i for i, t in enumerate(TASKS)
    }


STUCK_AT_ZERO = {
    "identity": GateConfig(transform="identity", select="dense"),
    "gain": GateConfig(transform="gain", select="dense"),
    "absolute": GateConfig(absolute=True, top_k=2),
    "cosine": GateConfig(score="cosine", select="dense"),
    "layer cosine": GateConfig(score="cosine", norm="layer", select="dense"),
    "constant": GateConfig(scope="constant", transform="identity", select="dense"),
    "task table": GateConfig(scope="task", score="table", transform="identity", select="dense"),
    "softmax": GateConfig(select="dense"),
}


@pytest.mark.parametrize("name", STUCK_AT_ZERO)
def test_an_added_expert_and_its_row_learn_under_every_gate(name):
    model = molora_model("llama", STUCK_AT_ZERO[name])
    model.add_expert("late", tasks=["new"])
    given = {"routing_task_ids": "new"} if name == "task table" else {}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(15):
        model(**batch_for("llama", seed=step), **given).loss.backward()
        assert torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0) < 100
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in parameters.items())


@pytest.mark.parametrize(
    ("gate", "removed", "options"),
    [
        (GateConfig(top_k=[2, 3], share="linear"), ["expert_2"], {}),
        (GateConfig(top_k={".*": 3}, share="linear"), ["expert_2"], {}),
        (GateConfig(select="top_p", min_k=3), ["expert_2"], {}),
        (GateConfig(top_k=2), ["expert_1", "expert_2"], {}),
    ],
)
def test_what_is_left_after_a_removal_can_be_saved_loaded_and_grown(tmp_path, gate, removed, options):
    model, batch = molora_model("llama", gate, tasks=None, **options), batch_for("llama")
    for name in removed:
        model.remove_expert(name)
    model.add_expert("late")
    molora.save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_removal_that_leaves_no_valid_mixture_changes_nothing():
    model = molora_model("llama", GateConfig(top_k=1), tasks=None, always_on={"expert_2": "rest"})
    model.remove_expert("expert_0")
    before = model(**batch_for("llama")).logits
    with pytest.raises(ConfigError, match="leaves the gate no expert"):
        model.remove_expert("expert_1")
    assert model.expert_names == ["expert_1", "expert_2"]
    assert torch.equal(model(**batch_for("llama")).logits, before)


def test_what_serves_all_rows_freezes_with_the_last_and_learns_again_with_the_first(tmp_path):
    model = molora_model("llama", GateConfig(score="mlp", select="dense"), plain_targets=["o_proj"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.freeze_experts(model.expert_names)
    left = [n for n, p in model.named_parameters() if p.requires_grad]
    assert left and all("o_proj" in n for n in left), "the plain LoRA is no expert"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, is_trainable=True)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == left
    model.unfreeze_experts("expert_0")
    assert any("hidden" in n for n, p in model.named_parameters() if p.requires_grad)
    model.add_expert("late")
    model.unfreeze_experts(model.expert_names[:-1])
    assert {n.rpartition(".")[0] for n in trained} <= {
        n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_task_named_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        molora_model("llama", "task-group").add_expert("late", tasks=["q", "q"])
    with pytest.raises(ConfigError, match=r"tasks\.t\.1: .*is there twice"):
        molora_model("llama", "task-group", tasks={"t": ["expert_0", "expert_0"]})


@pytest.mark.parametrize("gate", ["top2-group", "task-group", "task-table"])
def test_cycles_of_adding_and_removing_leave_no_trace(gate):
    """All but the counter of ids, which are never used again: the config stays as small as it was."""
    model = molora_model("llama", gate)
    before, tensors = model.active_peft_config.to_dict(), [*model.state_dict()]
    for i in range(20):
        model.add_expert(f"e{i}", tasks=[f"t{i}"], isolate=i % 2 == 1, freeze_others=False)
        assert model.active_peft_config.added_for == {f"t{i}": f"e{i}"}
        model.remove_expert(f"e{i}", drop_tasks=True)
    after = model.active_peft_config.to_dict()
    assert after.pop("next_task_id") == before.pop("next_task_id") + 20
    assert after == before and [*model.state_dict()] == tensors


def test_a_task_stays_unless_it_is_to_be_dropped():
    model = molora_model("llama", "top2-group")
    model.add_expert("new", tasks=["t"])
    model.remove_expert("new")
    assert "t" in model.tasks and model.active_peft_config.added_for == {}


@pytest.mark.parametrize(
    "gate",
    [
        GateConfig(scope="sequence", share="block", top_k=2),
        GateConfig(scope="token", blend="sequence", select="dense", share="group"),
    ],
)
def test_a_prompt_that_was_decided_on_before_growing_is_not_continued(gate):
    model = molora_model("llama", gate, tasks=None).eval()
    cache, ids = DynamicCache(), torch.randint(3, 50, (2, 5))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        model.add_expert("late")
        with pytest.raises(RoutingError, match="with its present experts"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

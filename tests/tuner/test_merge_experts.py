"""merge_experts: the mean of several experts serves all of their tasks, and no other task notices."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig, MoLoraConfig
from molora.config.roster import merged
from tests.config.test_roster import roster
from tests.tuner.test_grow import banks, train
from tests.zoo import ARCHITECTURES, base_model, batch_for, molora_model

BOTH = ["expert_0", "expert_1"]


def at(model, batch, task):
    with torch.no_grad(), molora.routing(model, task):
        return model(**batch).logits


def weighed(model, batch, experts):
    with torch.no_grad(), molora.routing(model, experts=experts):
        return model(**batch).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_the_sum_of_the_ranks_it_is_the_mean_and_other_tasks_stay_bit_equal(architecture):
    model, batch = molora_model(architecture, "task-group", blocks=1).double(), batch_for(architecture)
    rank = 2 * banks(model)[0].ranks[0]
    mean, other = weighed(model, batch, {"expert_0": 0.25, "expert_1": 0.75}), at(model, batch, "gamma")
    assert (at(model, batch, "alpha") - at(model, batch, "beta")).abs().max() > 1e-4
    model.merge_experts(BOTH, into="both", weights={"expert_0": 1, "expert_1": 3}, rank=rank)
    assert model.expert_names == ["expert_2", "both"]
    assert model.tasks == {"alpha": {"both": 1.0}, "beta": {"both": 1.0}, "gamma": {"expert_2": 1.0}}
    assert model.task_ids == {"alpha": 0, "beta": 1, "gamma": 2}
    assert_close(at(model, batch, "alpha"), mean, atol=1e-10, rtol=1e-10)
    assert torch.equal(at(model, batch, "alpha"), at(model, batch, "beta"))
    assert torch.equal(at(model, batch, "gamma"), other)


@pytest.mark.parametrize("kind", ["lora", "lora_fa", "adalora", "sparse"])
def test_of_the_configs_rank_it_is_the_nearest(kind):
    settings = {"target_r": 1} if kind == "adalora" else {}
    config = MoLoraConfig(
        num_experts=3, r=2, kind=kind, kind_settings=settings, gate=GateConfig(scope="task"),
        task_type="CAUSAL_LM", target_modules="all-linear",
        tasks={"x": ["expert_0"], "y": ["expert_1"], "z": ["expert_2"]},
    )  # fmt: skip
    model, batch = get_peft_model(base_model("llama", blocks=1), config), batch_for("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for task in "xyz":
        train(model, optimizer, batch, routing_task_ids=task)
    means = [(bank.expert(0).delta() + bank.expert(1).delta()) / 2 for bank in banks(model)]
    model.merge_experts(BOTH, into="both")
    for bank, mean in zip(banks(model), means, strict=True):
        U, S, V = torch.linalg.svd(mean)
        assert_close(bank.expert(1).delta(), U[:, :2] * S[:2] @ V[:2], atol=1e-6, rtol=1e-3)


def test_experts_that_share_A_keep_it():
    config = MoLoraConfig(
        num_experts=3, r=2, share_A=True, gate=GateConfig(scope="task"),
        task_type="CAUSAL_LM", target_modules="all-linear",
        tasks={"x": ["expert_0"], "y": ["expert_1"], "z": ["expert_2"]},
    )  # fmt: skip
    model, batch = get_peft_model(base_model("llama", blocks=1), config), batch_for("llama")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    mean = weighed(model, batch, {"expert_0": 0.5, "expert_1": 0.5})
    model.merge_experts(BOTH, into="both")
    assert_close(at(model, batch, "x"), mean, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="leave out `rank`"):
        model.merge_experts(["both", "expert_2"], into="all", rank=4)


def test_what_was_merged_is_saved_trained_grown_and_frozen_as_its_parts_were(tmp_path):
    model, batch = molora_model("llama", "task-group", blocks=1), batch_for("llama")
    model.freeze_experts(BOTH)
    model.merge_experts(BOTH, into="both", rank=5)
    assert model.trainable_experts == ["expert_2"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama", blocks=1), tmp_path, is_trainable=True)
    assert torch.equal(at(loaded, batch, "beta"), at(model, batch, "beta"))
    assert loaded.trainable_experts == ["expert_2"]
    before = at(loaded, batch, "alpha")
    loaded.add_expert("late", tasks=["delta"])
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=0.01)
    train(loaded, optimizer, batch, routing_task_ids="delta")
    assert torch.equal(at(loaded, batch, "alpha"), before)
    loaded.unfreeze_experts("both")
    train(
        loaded, torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=0.01), batch,
        routing_task_ids="alpha",
    )  # fmt: skip
    assert not torch.equal(at(loaded, batch, "alpha"), before)
    loaded.remove_expert("both", drop_tasks=True)
    assert set(loaded.tasks) == {"gamma", "delta"}


def test_a_layer_without_them_stays_without():
    """Of two blocks, the first has one expert, which is not merged."""
    config = MoLoraConfig(
        num_experts=[1, 3], r=2, gate=GateConfig(scope="task"),
        task_type="CAUSAL_LM", target_modules="all-linear",
        tasks={"x": ["expert_0", "expert_1"], "y": ["expert_0", "expert_2"]},
    )  # fmt: skip
    model = get_peft_model(base_model("llama"), config)
    model.merge_experts(["expert_1", "expert_2"], into="both")
    first = banks(model)[0]
    assert first.num_experts == 2 and not first.expert(1).delta().any() and first.expert(1).A.any()
    assert model.tasks["x"] == {"expert_0": 0.5, "both": 0.5} == model.tasks["y"]


def test_a_task_gives_the_new_expert_what_the_old_ones_had():
    table = roster(
        tasks={"x": ["a", "b", "c"], "y": {"a": 0.2, "b": 0.3, "c": 0.5}, "z": ["c"], "w": ["a", "b"]}
    )
    found = {task: row.experts for task, row in merged(table, ["a", "b"], "ab").tasks.items()}
    assert found["x"] == pytest.approx({"c": 1 / 3, "ab": 2 / 3})
    assert found["y"] == pytest.approx({"c": 0.5, "ab": 0.5})
    assert found["z"] == ["c"] and found["w"] == ["ab"]


@pytest.mark.parametrize(
    ("gate", "names", "settings", "said"),
    [
        ("soft-group", BOTH, {}, "this adapter's gate learned when to use each expert"),
        ("task-group", ["expert_0", "expert_9"], {}, "no expert 'expert_9'"),
        ("task-group", ["expert_0", "expert_0"], {}, "two or more different experts"),
        ("task-group", ["expert_0"], {}, "two or more different experts"),
        ("task-group", BOTH, {"into": "expert_2"}, "there is an expert 'expert_2' already"),
        ("task-group", BOTH, {"into": "a/b"}, "expert"),
        ("task-group", BOTH, {"rank": 0}, "rank is 0"),
        ("task-group", BOTH, {"weights": {"expert_0": 1.0}}, "a positive number"),
        ("task-group", BOTH, {"weights": {"expert_0": 1.0, "expert_1": -1.0}}, "a positive number"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(gate, names, settings, said):
    model, batch = molora_model("llama", gate, blocks=1), batch_for("llama")
    before = at(model, batch, "alpha")
    with pytest.raises(ConfigError, match=said):
        model.merge_experts(names, **{"into": "both", **settings})
    assert model.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert torch.equal(at(model, batch, "alpha"), before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "dora"}, "cannot become one"),
        ({"kind": "vera"}, "cannot become one"),
        ({"task_cores": True, "share_A": True}, "a core of its own"),
        ({"always_on": {"expert_0": 1.0}}, "expert_0 is always on"),
        ({"num_virtual_tokens": 2}, "virtual tokens"),
    ],
    ids=str,
)
def test_experts_whose_updates_have_no_mean_are_refused(settings, said):
    config = MoLoraConfig(
        num_experts=3, r=2, gate=GateConfig(scope="task"),
        task_type="CAUSAL_LM", target_modules="all-linear",
        tasks={"x": ["expert_0"], "y": ["expert_1"], "z": ["expert_2"]}, **settings,
    )  # fmt: skip
    model = get_peft_model(base_model("llama", blocks=1), config)
    with pytest.raises(ConfigError, match=said):
        model.merge_experts(BOTH, into="both")

"""Experts that are left out: the model answers as if they had never been added."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import molora
from molora.errors import RoutingError
from tests.zoo import HARD, LEARNED, TASKS, batch_for, molora_model, pairs, randomise

LEFT_OUT = "expert_1"


def logits(model, architecture, **kwargs):
    with torch.no_grad():
        return model(**batch_for(architecture), **kwargs).logits


def features(gate):
    drawn = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return {"routing_features": drawn} if gate.startswith("external") else {}


ELSEWHERE = [("t5", "top2-block"), ("bert", "sequence-last"), ("gpt2", "twopass-linear")]


@pytest.mark.parametrize(("architecture", "gate"), [*pairs(LEARNED, architectures=["llama"]), *ELSEWHERE])
def test_a_learned_gate_decides_over_the_others(architecture, gate):
    shared = {"tasks": {task: ["expert_0", "expert_2"] for task in TASKS}} if gate.startswith("task") else {}
    model = molora_model(architecture, gate, **shared)
    given = features(gate) | ({"routing_task_ids": [*TASKS]} if gate.startswith("task") else {})
    whole = logits(model, architecture, **given)
    with molora.routing(model, without=[LEFT_OUT]):
        found = logits(model, architecture, **given)
    assert torch.equal(logits(model, architecture, **given), whole)
    model.remove_expert(LEFT_OUT)
    assert_close(found, logits(model, architecture, **given), rtol=0, atol=2e-6)
    assert gate.startswith("task") or not torch.equal(found, whole)


@pytest.mark.parametrize("ids", [["alpha"] * 3, ["alpha", "beta", "gamma"], ["alpha", "beta", -1]])
@pytest.mark.parametrize("gate", HARD)
def test_of_a_tasks_weights_the_others_remain(gate, ids):
    tasks = {
        "alpha": {"expert_0": 1.0, "expert_1": 1.0},
        "beta": {"expert_0": 0.3, "expert_1": 0.7},
        "gamma": ["expert_1"],
    }
    left = {"alpha": {"expert_0": 1.0}, "beta": {"expert_0": 0.3}, "gamma": None, -1: None}
    model = molora_model("llama", gate, tasks=tasks)
    with molora.routing(model, without=LEFT_OUT):
        found = logits(model, "llama", routing_task_ids=ids)
    for i, task in enumerate(ids):
        how = {"task_ids": -1} if left[task] is None else {"experts": left[task]}
        with molora.routing(model, **how), torch.no_grad():
            row = {key: value[i : i + 1] for key, value in batch_for("llama").items()}
            given = {} if left[task] is None else {"routing_task_ids": ["alpha"]}
            assert_close(found[i : i + 1], model(**row, **given).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("ids", [["alpha", "beta", "delta"], ["beta"] * 3])
def test_beside_what_is_hidden_from_a_task(ids):
    """A batch of several tasks, each of which sees other experts."""
    model = molora_model("llama", "soft-group")
    model.add_expert("late", tasks=["delta"], isolate=True)
    randomise(model)
    with molora.routing(model, without=["expert_0"]):
        found = logits(model, "llama", routing_task_ids=ids)
    model.remove_expert("expert_0", drop_tasks=True)
    for i, task in enumerate(ids):
        row = {key: value[i : i + 1] for key, value in batch_for("llama").items()}
        task = task if task in model.task_ids else "beta"  # both see all but the late one
        with torch.no_grad():
            assert_close(found[i : i + 1], model(**row, routing_task_ids=[task]).logits, rtol=0, atol=2e-6)


def test_all_left_out_is_the_base():
    for gate in ("soft-group", "top2-group", "task-group", "constant-linear"):
        model = molora_model("llama", gate)
        ids = {"routing_task_ids": ["alpha"] * 3}
        with molora.routing(model, without=model.expert_names):
            found = logits(model, "llama", **ids)
        assert_close(found, logits(model, "llama", routing_task_ids=[-1] * 3), rtol=0, atol=1e-6)


def test_no_gradient_reaches_what_is_left_out():
    model = molora_model("llama", "soft-group")
    model.add_expert("late")
    with molora.routing(model, without=["late"]):
        loss = model.train()(**batch_for("llama")).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained  # the new expert and its gate row
    if loss.requires_grad:
        for gradient in torch.autograd.grad(loss, trained, allow_unused=True):
            assert gradient is None or not gradient.any()


def test_what_cannot_be_meant():
    model = molora_model("llama")
    for given, words in (
        ({"without": ["expert_9"]}, "unknown expert 'expert_9'"),
        ({"experts": ["expert_0"], "without": ["expert_1"]}, "nothing to leave out"),
    ):
        with pytest.raises(RoutingError, match=words), molora.routing(model, **given):
            pass

"""Task ids and forced experts: every way to give them, precedence, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import RoutingError
from tests.zoo import GATES, TASKS, batch_for, molora_model, routed


@pytest.fixture(scope="module")
def task_model():
    return molora_model("llama", "task-group")


@pytest.fixture(scope="module")
def batch():
    return batch_for("llama")


def test_names_ids_tensors_and_contexts_agree(task_model, batch):
    expected = task_model(**batch, routing_task_ids=["gamma", "alpha", "beta"]).logits
    for ids in ([2, 0, 1], torch.tensor([2, 0, 1]), ["gamma", 0, "beta"]):
        assert torch.equal(task_model(**batch, routing_task_ids=ids).logits, expected)
    by_token = torch.tensor([[2] * 7, [0] * 7, [1] * 7])  # computed in another way
    assert_close(task_model(**batch, routing_task_ids=by_token).logits, expected, atol=1e-6, rtol=1e-5)
    with molora.routing(task_model, ["gamma", "alpha", "beta"]):
        assert torch.equal(task_model(**batch).logits, expected)
        assert torch.equal(task_model.base_model.model(**batch).logits, expected)


def test_ids_per_token(task_model, batch):
    ids = torch.zeros(3, 7, dtype=torch.long)
    ids[:, 4:] = 1
    mixed = task_model(**batch, routing_task_ids=ids).logits
    assert_close(
        mixed[:, :4], task_model(**batch, routing_task_ids="alpha").logits[:, :4], atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(
        mixed[:, 4:], task_model(**batch, routing_task_ids="alpha").logits[:, 4:], atol=1e-3
    )


def test_the_keyword_beats_the_inner_context_which_beats_the_outer(task_model, batch):
    logits = {task: task_model(**batch, routing_task_ids=task).logits for task in TASKS}
    with molora.routing(task_model, "alpha"):
        with molora.routing(task_model, "beta"):
            assert torch.equal(task_model(**batch).logits, logits["beta"])
            assert torch.equal(task_model(**batch, routing_task_ids="gamma").logits, logits["gamma"])
        assert torch.equal(task_model(**batch).logits, logits["alpha"])
    with pytest.raises(RoutingError, match="no task ids were given"):
        task_model(**batch)


def test_a_failed_forward_leaves_no_state_behind(task_model, batch):
    with pytest.raises(Exception, match=r"index|size|shape|range"):
        task_model(input_ids=torch.tensor([[999]]), routing_task_ids="alpha")
    with pytest.raises(RoutingError, match="Tasks: alpha, beta, gamma"):
        task_model(**batch)
    assert task_model.base_model.context.here.call is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m(**b, routing_task_ids=["alfa"] * 3), "unknown task 'alfa'. Did you mean 'alpha'"),
        (lambda m, b: m(**b, routing_task_ids=[7, 0, 0]), r"unknown task 7.*'alpha' \(id 0\)"),
        (lambda m, b: m(**b, routing_task_ids=["alpha", "beta"]), "for 2 samples, but the batch has 3"),
        (lambda m, b: m(**b, routing_task_ids=torch.zeros(3)), "must be integers"),
        (lambda m, b: m(**b, routing_task_ids=[]), "empty"),
        (lambda m, b: m(**b, routing_task_ids=torch.tensor([[0, 1]] * 3)), "do not fit"),
    ],
)
def test_bad_ids_name_what_is_known(task_model, batch, call, message):
    with pytest.raises(RoutingError, match=message):
        call(task_model, batch)


def test_bad_contexts_are_refused_at_once(task_model):
    with pytest.raises(RoutingError, match="by='expert'"), molora.routing(task_model, "alpha", by="expert"):
        pass
    with (
        pytest.raises(RoutingError, match="unknown expert 'expert_9'"),
        molora.routing(task_model, experts=["expert_9"]),
    ):
        pass
    model = molora_model("llama")
    with molora.routing(model, by="task"), pytest.raises(RoutingError, match="by='task' was asked for"):
        model(**batch_for("llama"))
    with pytest.raises(molora.ConfigError, match="no molora adapter"):
        molora.record_routing(torch.nn.Linear(2, 2)).__enter__()


@pytest.mark.parametrize("gate", [g for g in GATES if not g.startswith("task")])
def test_under_a_learned_gate_ids_only_label_unless_by_task(gate, batch):
    batch = {**batch, **routed(gate)}
    model = molora_model("llama", gate, tasks={"alpha": ["expert_0"], "beta": ["expert_1", "expert_2"]})
    free = model(**batch).logits
    assert torch.equal(model(**batch, routing_task_ids="alpha").logits, free)
    with molora.routing(model, "alpha", by="task"):
        restricted = model(**batch).logits
    with molora.routing(model, experts={"expert_0": 1.0}):
        forced = model(**batch).logits
    if gate == "top1-linear":  # weighted by its probability, which is 1 over one expert
        assert not torch.allclose(restricted, free, atol=1e-3)
    assert_close(restricted, forced, atol=1e-5, rtol=1e-5)


def test_several_forced_experts_are_weighted_as_told(batch):
    model = molora_model("llama", "soft-group", dtype=torch.float64)
    merged = copy.deepcopy(model).merge_and_unload(expert_weights={"expert_0": 0.25, "expert_2": 1.5})
    with molora.routing(model, experts={"expert_2": 1.5, "expert_0": 0.25}):
        assert_close(model(**batch).logits, merged(**batch).logits, atol=1e-9, rtol=1e-9)
    equal = copy.deepcopy(model).merge_and_unload(expert_weights=[0.5, 0.5, 0.0])
    with molora.routing(model, experts=["expert_0", "expert_1"]):
        assert_close(model(**batch).logits, equal(**batch).logits, atol=1e-9, rtol=1e-9)


def test_copies_have_a_context_of_their_own(task_model, batch):
    twin = copy.deepcopy(task_model)
    assert twin.base_model.context is not task_model.base_model.context
    with molora.routing(twin, "beta"):
        assert torch.equal(twin(**batch).logits, task_model(**batch, routing_task_ids="beta").logits)
        with pytest.raises(RoutingError, match="no task ids"):
            task_model(**batch)


def test_two_adapters_route_by_their_own_tasks(batch):
    from tests.zoo import config_for, randomise

    model = molora_model("llama", "task-group")
    alone = model(**batch, routing_task_ids="alpha").logits
    model.add_adapter("other", config_for("llama", "task-group", tasks=["gamma", "alpha"]))
    randomise(model, seed=9)
    model.set_adapter("other")
    other = model(**batch, routing_task_ids="alpha").logits
    with molora.routing(model, experts=["expert_1"]):
        assert_close(model(**batch).logits, other, atol=1e-5, rtol=1e-5)
    model.set_adapter("default")
    assert model(**batch, routing_task_ids="alpha").logits.shape == alone.shape
    with molora.routing(model, experts=["expert_0"]):
        first = model(**batch).logits
    assert_close(model(**batch, routing_task_ids="alpha").logits, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_training_on_a_base_only_batch_gives_every_parameter_a_zero_gradient(gate, batch):
    model = molora_model("llama", gate, plain_targets=["o_proj"]).train()
    with model.disable_adapter():
        expected = model(**batch).logits
    out = model(**batch, **{**routed(gate), "routing_task_ids": torch.tensor([-1, -1, -1])})
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name

"""I14: gradient checkpointing changes neither loss, auxiliary losses nor gradients, however the backward is run."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import ConfigError
from molora.tuner.layer import MoLoraLayer
from tests.zoo import ARCHITECTURES, GATES, LEARNED, batch_for, gradients, molora_model, pairs, routed

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
CLOSE = {"atol": 1e-11, "rtol": 1e-9}
TASK_IDS = {"first": ["alpha", "beta", None], "second": ["gamma", "alpha", "beta"]}


def training_model(architecture, gate, use_reentrant=None, **options):
    """A model in train mode; `use_reentrant=None` leaves checkpointing off.

    In float64: checkpointing switches off T5's cache, after which torch picks other matmuls.
    """
    model = molora_model(architecture, gate, dtype=torch.float64, **options).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # the reentrant form needs an input with a gradient
    return model


def one_step(model, architecture, ids):
    out = model(**batch_for(architecture), **ids)
    aux = {name: value.detach() for name, value in molora.aux_losses(model).items()}
    out.loss.backward()
    return out.loss.detach(), aux, gradients(model)


def runs_of_a_layer(model):
    """A list that grows by one whenever an adapted layer inside a block runs: twice if it is recomputed."""
    runs = []
    layer = next(m for name, m in model.named_modules() if isinstance(m, MoLoraLayer) and ".0." in name)
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


# The reentrant form runs the same modules again: what it may lose is what a scope keeps for the blocks.
REENTRANT = ("top2-block", "constant-global", "sequence-last", "sequence-mean", "external-global", "external-mlp",
             "twopass-global", "twopass-linear", "task-table", "task-group")  # fmt: skip


FAST = {False: ("llama", "bert"), True: ("llama",)}  # other architectures: the tests below


@pytest.mark.parametrize(
    ("architecture", "gate", "use_reentrant"),
    [
        pytest.param(a, gate, again, marks=() if a in FAST[again] else pytest.mark.slow)
        for again, gates in ((False, GATES), (True, REENTRANT))
        for a, gate in pairs(gates)
    ],
)
def test_I14_same_loss_aux_and_gradients(architecture, gate, use_reentrant):
    learned = gate in LEARNED and not use_reentrant
    options = {"aux_losses": {"balance": 0.1} if learned else {}, "lora_dropout": 0.1}
    results = []
    for mode in (None, use_reentrant):
        model = training_model(architecture, gate, mode, **options)
        runs = runs_of_a_layer(model)
        torch.manual_seed(5)
        results.append(one_step(model, architecture, routed(gate)))
        # Two-pass gates run the base once before; without gradients, so that nothing of it is run again.
        assert len(runs) == (1 if mode is None else 2) + gate.startswith("twopass")
    (loss, aux, expected), (other_loss, other_aux, actual) = results
    assert_close(loss, other_loss, **CLOSE)
    assert_close(aux, other_aux, **CLOSE)
    assert bool(aux) == learned
    assert set(expected) == set(actual)
    for name in expected:
        assert_close(actual[name], expected[name], **CLOSE)


@architectures
@reentrant
def test_two_forwards_with_other_task_ids_before_one_backward(architecture, use_reentrant):
    found = []
    for mode in (None, use_reentrant):
        model = training_model(architecture, "task-group", mode)
        batches = [batch_for(architecture, seed=seed) for seed in (0, 1)]
        losses = [
            model(**batch, routing_task_ids=ids).loss
            for batch, ids in zip(batches, TASK_IDS.values(), strict=True)
        ]
        sum(losses).backward()
        found.append(gradients(model))
    assert set(found[0]) == set(found[1])
    for name in found[0]:
        assert_close(found[1][name], found[0][name], **CLOSE)


@architectures
@reentrant
def test_backward_in_another_thread_after_the_routing_context_has_closed(architecture, use_reentrant):
    found = []
    for mode in (None, use_reentrant):
        model = training_model(architecture, "task-group", mode)
        with molora.routing(model, TASK_IDS["first"]):
            loss = model(**batch_for(architecture)).loss
        with molora.routing(model, TASK_IDS["second"]), torch.no_grad():
            model(**batch_for(architecture))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found.append(gradients(model))
    assert found[0] and set(found[0]) == set(found[1])
    for name in found[0]:
        assert_close(found[1][name], found[0][name], **CLOSE)


@architectures
def test_recomputing_counts_nothing_twice(architecture):
    tokens = []
    for mode in (None, False):
        model = training_model(architecture, "soft-group", mode)
        with molora.record_routing(model) as record:
            model(**batch_for(architecture)).loss.backward()
        tokens.append(record.tokens)
    assert tokens[0] == tokens[1] > 0


@architectures
def test_aux_losses_under_reentrant_checkpointing_are_refused(architecture):
    model = training_model(architecture, "top2-group", True, aux_losses={"balance": 0.1})
    with pytest.raises(ConfigError, match="no gradient under reentrant gradient checkpointing"):
        model(**batch_for(architecture))
    with torch.no_grad():
        model.eval()(**batch_for(architecture))  # nothing is lost where nothing is trained
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(**batch_for(architecture)).loss.backward()
    assert any("molora_gate" in name for name in gradients(model))


@architectures
def test_transformers_own_switch(architecture):
    _, _, expected = one_step(training_model(architecture, "task-group"), architecture, routed("task-group"))
    model = training_model(architecture, "task-group")
    model.base_model.model.gradient_checkpointing_enable()
    runs = runs_of_a_layer(model)
    _, _, actual = one_step(model, architecture, routed("task-group"))
    assert len(runs) == 2 and set(actual) == set(expected)
    for name in expected:
        assert_close(actual[name], expected[name], **CLOSE)


def test_switching_checkpointing_off_again():
    model = training_model("llama", "task-group", False)
    one_step(model, "llama", routed("task-group"))
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_disable()
    _, _, actual = one_step(model, "llama", routed("task-group"))
    _, _, expected = one_step(training_model("llama", "task-group"), "llama", routed("task-group"))
    for name in expected:
        assert_close(actual[name], expected[name], **CLOSE)

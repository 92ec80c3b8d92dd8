"""torch.compile: one graph, the same values and gradients, and no new graph for other task ids."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import StaticCache

import molora
from tests.zoo import ARCHITECTURES, batch_for, gradients, molora_model

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
KINDS = {
    "top2-group": {"aux_losses": {"balance": 0.1, "z": 0.01}},
    "task-group": {},
    "constant-global": {"aux_losses": {"balance": 0.1}},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids_for(gate, *values):
    return {"routing_task_ids": torch.tensor(values)} if gate.startswith("task") else {}


def step(model, architecture, ids):
    model.zero_grad()
    out = model(**batch_for(architecture), **ids)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), gradients(model)


FAST = {("bert", "top2-group")}  # a few seconds
CASES = [
    pytest.param(a, gate, marks=() if (a, gate) in FAST else pytest.mark.slow, id=f"{a}-{gate}")
    for a in ARCHITECTURES
    for gate in KINDS
]


@pytest.mark.parametrize(("architecture", "gate"), CASES)
def test_training_compiles_to_one_graph_with_equal_gradients(architecture, gate):
    # One block says as much where no gate reaches over several.
    model = molora_model(architecture, gate, blocks=1 if gate == "top2-group" else 2, **KINDS[gate]).train()
    if architecture == "gpt2":
        model.base_model.model.loss_type = "ForCausalLM"  # else transformers logs, which breaks a graph
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for values in ((0, 1, 2), (2, 2, 2), (-1, 1, -1)):
        ids = ids_for(gate, *values)
        loss, logits, expected = step(model, architecture, ids)
        other_loss, other_logits, actual = step(compiled, architecture, ids)
        assert_close(other_logits, logits, atol=1e-5, rtol=1e-5)
        assert_close(other_loss, loss)
        assert_close({name.removeprefix("_orig_mod."): g for name, g in actual.items()}, expected, **CLOSE)
    assert backend.frame_count == 1  # neither a graph break nor a new graph for other task ids


@pytest.mark.slow
def test_context_routing_and_aux_losses_reach_a_compiled_model():
    model = molora_model("gpt2", "top2-group", aux_losses={"balance": 0.1}, add_aux_to_loss=False).train()
    batch = {key: value for key, value in batch_for("gpt2").items() if key != "labels"}
    expected = model(**batch).logits, molora.aux_losses(model)["balance"]
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(**batch).logits, expected[0], atol=1e-5, rtol=1e-5)
    balance = molora.aux_losses(compiled)["balance"]
    assert_close(balance, expected[1])
    balance.backward()
    assert any("molora_gate" in name for name in gradients(model))
    with molora.routing(compiled, experts=["expert_1"]):
        forced = compiled(**batch).logits
    with molora.routing(model, experts=["expert_1"]):
        assert_close(forced, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(forced, expected[0], atol=1e-2)


def test_a_fresh_model_compiles_once():
    model = molora_model("gpt2", "top2-group", blocks=1).train()
    model.base_model.model.loss_type = "ForCausalLM"
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        step(compiled, "gpt2", {})
    assert backend.frame_count == 1


@pytest.mark.parametrize("gate", ["top2-group", pytest.param("task-group", marks=pytest.mark.slow)])
def test_decoding_with_a_static_cache_compiles_to_one_graph(gate):
    model = molora_model("llama", gate, blocks=1)
    ids = batch_for("llama", batch=2, seq=6)["input_ids"]
    task = torch.tensor([1, 2]) if gate.startswith("task") else None
    with torch.no_grad():
        expected = model(input_ids=ids, routing_task_ids=task).logits
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(input_ids=ids[:, :2], past_key_values=cache, routing_task_ids=task)
        for i in range(2, 6):
            step_logits = compiled(
                input_ids=ids[:, i : i + 1], past_key_values=cache, cache_position=torch.tensor([i]), routing_task_ids=task
            ).logits  # fmt: skip
            assert_close(step_logits[:, 0], expected[:, i], atol=1e-5, rtol=1e-5)
    assert backend.frame_count == 1  # every step runs the same graph: what a CUDA graph needs

"""A mixture on a CUDA device: outputs, memory, compile, decoding, files that move to a CPU."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

import molora
from eval import gpu_stages
from eval.bench.peers import MOLORA, PEFT_SMALL, Size
from tests.zoo import base_model, batch_for, gradients, molora_model

pytestmark = pytest.mark.gpu


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def test_outputs_and_gradients_are_those_of_the_cpu(device):
    model = molora_model("llama", aux_losses={"balance": 0.1}).train()
    results = []
    for where in ("cpu", device):
        model.to(where).zero_grad()
        out = model(**on(where, batch_for("llama", padding="right")))
        out.loss.backward()
        results.append((out.logits.cpu(), {name: g.cpu() for name, g in gradients(model).items()}))
    assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-3)
    assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one(device):
    batch = on(device, batch_for("llama"))
    weights = []
    for compiled in (False, True):
        model = molora_model("llama", aux_losses={"balance": 0.1}).to(device).train()
        forward = torch.compile(model) if compiled else model
        # Not AdamW: its first steps have the size of lr whatever the gradient's, and its sign decides at zero.
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            loss = forward(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        weights[-1]["losses"] = torch.tensor(losses)
    assert losses[-1] < losses[0]
    assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("gate", ["top2-group", "soft-linear"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(device, gate, dtype, atol):
    model = molora_model("llama", gate).to(device, dtype)
    ids = batch_for("llama", batch=2, seq=9)["input_ids"].to(device)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        part = model(input_ids=ids[:, :4], use_cache=True)
        logits = [part.logits]
        for i in range(4, ids.shape[1]):
            part = model(input_ids=ids[:, i : i + 1], past_key_values=part.past_key_values, use_cache=True)
            logits.append(part.logits)
    stepwise = torch.cat(logits, dim=1)
    if dtype == torch.float32:
        assert_close(stepwise, whole, atol=atol, rtol=1e-3)
    else:  # two rounded scores may swap a token's experts: most logits are near, not all
        near = (stepwise - whole).abs() <= atol * whole.abs().max()
        assert near.float().mean() > 0.95


def test_statistics_and_task_ids_work_on_the_device(device):
    model = molora_model("llama", "task-group").to(device)
    with molora.record_routing(model) as record, torch.no_grad():
        model(**on(device, batch_for("llama")), routing_task_ids=["alpha", "beta", "gamma"])
    assert record.by_task()["beta"]["expert_1"] == pytest.approx(1.0)


def test_a_learned_gate_is_recorded_as_on_the_cpu(device):
    model, tables = molora_model("llama"), []
    for where in ("cpu", device):
        model.to(where)
        with molora.record_routing(model) as record, torch.no_grad():
            model(**on(where, batch_for("llama", padding="right")))
        tables.append({(row["gate"], row["expert"]): row["mean_weight"] for row in record.table()})
    assert tables[0] and tables[1] == pytest.approx(tables[0], abs=1e-4)


def test_an_adapter_saved_there_loads_on_a_cpu(device, tmp_path):
    model = molora_model("llama").to(device)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path, torch_device="cpu").eval()
    expected = {name: value.cpu() for name, value in model.state_dict().items() if "molora_" in name}
    found = {name: value for name, value in again.state_dict().items() if "molora_" in name}
    assert expected.keys() == found.keys()
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with torch.no_grad():
        batch = batch_for("llama")
        assert_close(again(**batch).logits, model(**on(device, batch)).logits.cpu(), atol=1e-4, rtol=1e-3)


def peaks(device, size, samples, seq):
    return {
        name: gpu_stages.step_memory(name, size, samples, seq, device=device) for name in (PEFT_SMALL, MOLORA)
    }


@pytest.mark.slow
def test_peak_memory_is_that_of_one_plain_lora(device):
    # So many tokens that the eight-fold adapters at rest, with their moments, are a small share: 1.5 % with them.
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    found = peaks(device, Size(4, 2048), 16, 2048)
    assert found[MOLORA]["peak"] <= 1.02 * found[PEFT_SMALL]["peak"], found

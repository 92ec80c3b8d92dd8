"""A mixture on a CUDA device: 200 steps in every precision, memory, compile, decoding, files that move to a CPU."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

import molora
from eval import gpu_stages
from eval.bench import peers
from eval.bench.step import training_step
from tests.zoo import base_model, batch_for, gradients, molora_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def test_every_precision_learns_like_float32():
    found = gpu_stages.precision_runs("cuda", 200, quick=True)
    failed = [check for check, passed in gpu_stages.judge_precision(found, 200).items() if not passed]
    assert not failed, found


def test_outputs_and_gradients_are_those_of_the_cpu():
    ours, theirs = molora_model("llama", aux_losses={"balance": 0.1}).train(), None
    results = []
    for device in ("cpu", "cuda"):
        theirs = ours.to(device)
        theirs.zero_grad()
        out = theirs(**on(device, batch_for("llama", padding="right")))
        out.loss.backward()
        results.append((out.logits.cpu(), {n: g.cpu() for n, g in gradients(theirs).items()}))
    assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-3)
    assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one():
    model = molora_model("llama").to("cuda").train()
    batch = on("cuda", batch_for("llama"))
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model)
    again = compiled(**batch).loss
    again.backward()
    assert_close(again, loss, atol=1e-4, rtol=1e-4)
    assert_close(gradients(model), expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_a_cache_is_decoding_without(dtype):
    model = molora_model("llama").to("cuda", dtype)
    ids = batch_for("llama", batch=2)["input_ids"].to("cuda")
    texts = [
        model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    if dtype == torch.float32:
        assert torch.equal(*texts)
    assert texts[0].shape == texts[1].shape


def test_statistics_and_task_ids_work_on_the_device():
    model = molora_model("llama", "task-group").to("cuda")
    with molora.record_routing(model) as record, torch.no_grad():
        model(**on("cuda", batch_for("llama")), routing_task_ids=["alpha", "beta", "gamma"])
    assert record.by_task()["beta"]["expert_1"] == pytest.approx(1.0)


def test_an_adapter_saved_there_loads_on_a_cpu(tmp_path):
    model = molora_model("llama").to("cuda")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    expected = {name: value.cpu() for name, value in model.state_dict().items() if "molora_" in name}
    found = {name: value for name, value in again.state_dict().items() if "molora_" in name}
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_peak_memory_is_that_of_one_plain_lora():
    base = peers.frozen_base(peers.Size(4, 1024), torch.bfloat16, "cuda")
    peaks = {}
    for name in (peers.PEFT_SMALL, peers.MOLORA):
        step = training_step(peers.CASES[name](peers.share(base), None), peers.batch(base, 4, 1024))
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[name] = torch.cuda.max_memory_allocated()
        del step
        torch.cuda.empty_cache()
    assert peaks[peers.MOLORA] <= 1.05 * peaks[peers.PEFT_SMALL], peaks

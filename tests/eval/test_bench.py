"""The benchmarks: their exact figures are held here, their scripts run, their peers do the work they claim."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval.bench import memory, peers, step
from tests.zoo import beyond

ROOT = Path(__file__).parents[2]
TINY = peers.Size(2, 64, vocab=64)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", beyond(memory.WIDTHS, next(iter(memory.WIDTHS))))
@pytest.mark.parametrize(("adapters", "most"), [("bf16", 1.015), ("fp32 + autocast", 0.90), ("fp32", 0.66)])
def test_saved_activations_over_peft_lora(width, adapters, most):
    ours, theirs = (
        memory.bytes_per_layer(peers.CASES[case], memory.WIDTHS[width], memory.TOKENS, adapters)
        for case in (peers.MOLORA, peers.PEFT_SMALL)
    )
    assert ours / theirs <= most


@pytest.mark.parametrize("case", memory.CASES)
@pytest.mark.parametrize("adapters", memory.ADAPTERS)
def test_a_fake_model_keeps_what_a_real_one_keeps(case, adapters):
    dtype, autocast = memory.ADAPTERS[adapters]
    build = peers.CASES[case]
    real = build(peers.frozen_base(TINY, torch.bfloat16), dtype)
    fake = memory.fake(build, TINY, dtype)
    counts = [memory.saved_bytes(model, 16, autocast=autocast) for model in (real, fake)]
    assert counts[0] == counts[1] > 0


# -- peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", peers.CASES)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_a_case_trains_its_adapters_and_nothing_else(case, adapter_dtype):
    base = peers.frozen_base(TINY, torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = peers.CASES[case](peers.share(base), adapter_dtype)
    inputs = peers.batch(base, 2, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=adapter_dtype is not None):
        loss = model(**inputs).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert inputs["inputs_embeds"].grad.any()
    assert not any(p.requires_grad for p in base.parameters())
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    pointers = {p.data_ptr() for p in base.parameters()}
    assert pointers <= {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in trained.values()}
    dtype = torch.float32 if case == peers.PEFT_SHIPPED else adapter_dtype or torch.bfloat16
    factors = {p.dtype for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    assert factors == ({dtype} if case != peers.BASE else set())
    wanted = {peers.BASE: 0, peers.XLORA_FROZEN: 2}.get(case)  # the classifier's weight and bias
    assert len(trained) == wanted if wanted is not None else any("lora_B" in name for name in trained)


def test_the_loop_is_a_top_k_mixture():
    layer = peers.LoopLinear(torch.nn.Linear(6, 5, bias=False), experts=4, rank=2, top_k=2)
    x = torch.randn(2, 3, 6)
    probabilities = layer.gate(x).softmax(dim=-1)
    weights = torch.where(
        probabilities >= probabilities.topk(2).values[..., -1:], probabilities, torch.tensor(0.0)
    )
    weights = weights / weights.sum(dim=-1, keepdim=True) * layer.scaling
    outputs = torch.stack([B(A(x)) for A, B in zip(layer.lora_A, layer.lora_B, strict=True)], dim=-1)
    wanted = layer.base_layer(x) + (outputs * weights.unsqueeze(-2)).sum(dim=-1)
    torch.testing.assert_close(layer(x), wanted)


# -- step ------------------------------------------------------------------------------------------


def test_bars_are_judged_on_their_shape_their_cpu_and_measured_cases():
    times = {peers.MOLORA: [2.0, 2.0], peers.PEFT_SMALL: [2.0, 2.0], peers.LOOP: [3.0, 3.0]}
    verdicts = step.judge("55M bf16", times, amx=True)
    assert list(verdicts.values()) == [(1.0, True), (1.5, False)]
    assert list(step.judge("55M bf16", times, amx=False).values()) == [(1.5, False)]
    assert step.judge("layer 1024 fp32", times, amx=True) == {}
    shapes = {*step.CPU_SHAPES, *step.CUDA_SHAPES}
    assert {shape for bar in step.BARS for shape in bar.shapes} <= shapes


def test_shapes_of_an_earlier_run_stay_if_the_environment_is_the_same(tmp_path):
    path = tmp_path / "step.json"
    assert step.with_earlier(path, {"b": 2}, {}) == {"b": 2}
    environment = {"torch": "2", "date": "yesterday"}
    path.write_text(json.dumps({"environment": environment, "shapes": {"a": 1, "b": 1}}))
    assert step.with_earlier(path, {"b": 2}, {"torch": "2", "date": "today"}) == {"a": 1, "b": 2}
    assert step.with_earlier(path, {"b": 2}, {"torch": "3", "date": "today"}) == {"b": 2}


# -- the scripts -----------------------------------------------------------------------------------


def _quick(name, path, *arguments):
    command = [sys.executable, "-m", f"eval.bench.{name}", "--quick", "--output", str(path), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return json.loads(path.read_text())


@pytest.mark.slow
def test_step_runs(tmp_path):
    found = _quick("step", tmp_path / "step.json")
    assert set(found["shapes"]) == set(step.QUICK_SHAPES)
    for name, shape in step.QUICK_SHAPES.items():
        assert set(found["shapes"][name]["cases"]) == set(step.cases_of(shape))


@pytest.mark.slow
def test_step_runs_compiled(tmp_path):
    found = _quick("step", tmp_path / "step.json", "--compile", "--shapes", "model quick")
    assert set(found["shapes"]["model quick compiled"]["cases"]) == set(step.COMPILED)


@pytest.mark.slow
def test_memory_runs(tmp_path):
    found = _quick("memory", tmp_path / "memory.json")
    assert set(found["widths"]) == {f"quick, {adapters}" for adapters in memory.ADAPTERS}

"""The check of a GPU runs from end to end on a CPU, keeps what it has, and tells a failure."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from eval import gpu_check, gpu_precision, gpu_stages
from eval.bench.peers import MOLORA, PEFT_SMALL, PEFT_WIDE
from tests.training.runs import ROOT


def settings(scratch, seconds):
    return gpu_check.Settings("cpu", True, scratch, time.perf_counter() + seconds)


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path):
    path = tmp_path / "a.json"
    command = [sys.executable, "-m", "eval.gpu_check", "--device", "cpu", "--quick", "--output", str(path)]
    # Above the sum of the stages' estimates, so that none is left out on a slow machine.
    done = subprocess.run([*command, "--budget", "1200"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(path.read_text())
    assert list(found["stages"]) == list(gpu_check.STAGES) == list(found["checks"])
    assert set(found["skipped"]) <= {"precision, int8 base", "precision, NF4 base"}
    assert set(found["stages"]["precision"]) == {"seconds", *gpu_precision.PRECISIONS}
    assert set(gpu_stages.MEMORY_CASES) <= set(found["stages"]["memory"])
    for stage in ("precision", "trainer", "lightning"):
        assert found["checks"][stage] and all(found["checks"][stage].values())
    assert {"machine", "torch", "peft"} <= set(found["environment"])


def test_what_does_not_fit_is_skipped_and_what_ran_is_kept(tmp_path):
    report = gpu_check.Report(tmp_path / "a.json", "cpu")
    gpu_check.run(settings(tmp_path, 30), report, ["gemms", "compiled step"])
    assert set(report.stages) == {"gemms"} and "left" in report.skipped["compiled step"]
    assert json.loads((tmp_path / "a.json").read_text())["stages"]["gemms"]["seconds"] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_stage_that_breaks_or_overruns_leaves_the_others(tmp_path, monkeypatch):
    def broken(_):
        raise ValueError("broken")

    def overrun(_):
        raise subprocess.TimeoutExpired("step", 7)

    stages = {"step": (overrun, 1), "precision": (broken, 1), "environment": gpu_check.STAGES["environment"]}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    report = gpu_check.Report(tmp_path / "a.json", "cpu")
    gpu_check.run(settings(tmp_path, 60), report, list(stages))
    assert set(report.stages) == {"precision", "environment"}
    assert "7 s" in report.skipped["step"]
    assert report.failed == ["precision: runs"]
    assert all(name in report.summary() for name in ("FAILED   precision: runs", "skipped  step"))


def test_precision_is_judged_against_float32():
    fine = {"first": 5.0, "last": 1.0, "finite": True, "float32": True, "routed": True, "skipped steps": 0}
    found = {
        "float32": fine,
        "bf16-mixed": {**fine, "last": 1.07},
        "16-mixed": {**fine, "last": 1.09, "skipped steps": 4},
        "int8 base": {"skipped": "no package"},
        "NF4 base": {"error": "broken"},
    }
    failed = {check for check, ok in gpu_precision.judge_precision(found).items() if not ok}
    assert failed == {
        "16-mixed: loss within 2% of float32's gain",
        "16-mixed: at most 3 steps skipped",
        "NF4 base: runs",
    }


def test_memory_is_judged_where_it_was_measured():
    found = {PEFT_SMALL: {"step": 10.0, "peak": 12.0}, PEFT_WIDE: {"step": 10.1, "peak": 12.3}}
    assert (
        list(gpu_stages.judge_memory(found | {MOLORA: {"step": 10.1, "peak": 12.4}}).values()) == [True] * 2
    )
    assert list(gpu_stages.judge_memory(found | {MOLORA: {"step": 10.3, "peak": 12.4}}).values()) == [
        False,
        True,
    ]
    assert gpu_stages.judge_memory(found | {MOLORA: {"out of memory": True}}) == {}


def test_no_training_sees_the_padding_token():
    # Its embedding is zero: the gradient of a norm there is beyond float16 at any loss scale.
    walks = torch.cat(list(gpu_precision.batches("cpu", 20, (16, 16))))
    assert walks.min() >= 1 and walks.max() < gpu_precision.VOCAB
    follows = {
        (a, b) for a, b in zip(walks[:, :-1].flatten().tolist(), walks[:, 1:].flatten().tolist(), strict=True)
    }
    assert len(follows) == len({a for a, _ in follows})

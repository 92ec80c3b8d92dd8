"""What the decoding, start-up and data-parallel benchmarks time is what they say; the pair of processes ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval.bench import checkouts, common, ddp, decode, naming, peers, startup
from eval.bench.peers import BASE, MOLORA, PEFT_WIDE

ROOT = Path(__file__).parents[2]
SHAPE = decode.QUICK_SHAPES["quick"]


def quick(name: str, path: Path, *more: str, seconds: int) -> dict:
    """The JSON of a quick run; one that does not end is stopped with the processes it started."""
    command = [sys.executable, "-m", f"eval.bench.{name}", *more, "--quick", "--output", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        assert process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    found = json.loads(path.read_text())
    assert set(common.environment()) <= set(found["environment"])
    return found


def decoded(name: str, base: torch.nn.Module, *, times: int = 1) -> list[torch.Tensor]:
    """Logits of the steps of each timing of a case, with the same random adapters for every case."""
    torch.manual_seed(0)
    model = decode.model_of(name, base, None)
    logits: list[torch.Tensor] = []
    run = decode.steps_of(name, model, SHAPE, compiled=False)
    model.register_forward_hook(lambda module, args, output: logits.append(output.logits))
    for _ in range(times):
        run()
    return list(torch.stack(logits).chunk(times))


@pytest.fixture
def base() -> torch.nn.Module:
    model = peers.frozen_base(SHAPE.size, SHAPE.dtype)
    model.config.use_cache = True
    return model


@pytest.mark.parametrize("name", decode.CASES)
def test_every_timing_of_decoding_repeats_the_same_steps(base, name):
    first, second, third = decoded(name, base, times=3)
    assert len(first) == decode.STEPS
    assert torch.equal(first, second) and torch.equal(first, third)
    plain = decoded(BASE, base)[0]
    assert torch.equal(first, plain) == (name == BASE)


def test_one_task_decodes_as_its_merged_expert_and_the_whole_mixture_does_not(base):
    merged, task, gated = (decoded(name, base)[0] for name in (decode.MERGED, decode.TASK_GATE, MOLORA))
    torch.testing.assert_close(task, merged, rtol=1e-4, atol=1e-5)
    assert (gated - merged).abs().max() > 1e-3


@pytest.mark.slow
def test_data_parallel_runs_end(tmp_path):
    # A worker that hangs at its end does so now and then: the limit is what this test is about.
    cases = quick("ddp", tmp_path / "a.json", seconds=240)["cases"]
    assert set(cases) == set(ddp.NAMES)
    assert all(case[key] > 0 for case in cases.values() for key in case if key != "gradient bytes")
    assert cases[BASE]["gradient bytes"] == 0
    # As much to reduce in both, but for the gates.
    assert 1 <= cases[MOLORA]["gradient bytes"] / cases[PEFT_WIDE]["gradient bytes"] < 1.1


@pytest.mark.slow
def test_a_checkout_keeps_as_much_as_itself(tmp_path):
    found = quick("checkouts", tmp_path / "a.json", ".", ".", seconds=240)["after over before"]
    assert {f"{gate}, {kind}" for gate in checkouts.GATES for kind in (*checkouts.KINDS, "saved")} == set(
        found
    )
    assert found["top-2, saved"]["median"] == found["task, saved"]["median"] == 1
    assert all(ratio["median"] > 0 for ratio in found.values())


@pytest.mark.slow
def test_start_up_times_every_command_and_both_methods(tmp_path):
    found = quick("startup", tmp_path / "a.json", seconds=300)
    assert set(found["processes"]) == set(startup.COMMANDS)
    assert all(row["s"] > 0 for row in found["processes"].values())
    assert found["adapters"].pop("linears") == 14
    assert len(found["adapters"]) == 2
    for row in found["adapters"].values():
        assert set(row) == {"wrap s", "save s", "load s"} and min(row.values()) > 0


@pytest.mark.parametrize("passes", [1, 2])
def test_prompts_are_named_in_the_passes_that_are_timed(passes):
    base = peers.frozen_base(naming.QUICK["quick"], torch.float32)
    model, runs = naming.adapter(base, passes), []
    first = model.base_model.model.model.layers[0]
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    run = naming.run_of("prefill", model, base, given=False)
    run()
    assert len(runs) == passes
    run = naming.run_of("prefill", model, base, given=True)
    runs.clear()
    run()
    assert len(runs) == 1
    run = naming.run_of("decode", model, base, given=False)
    runs.clear()
    run()
    assert len(runs) == naming.STEPS


@pytest.mark.slow
def test_naming_is_measured_in_both_modes(tmp_path):
    found = quick("naming", tmp_path / "a.json", seconds=300)
    modes = found["shapes"]["quick"]
    assert set(modes) == {"rounds", *naming.MODES}
    assert all(set(modes[m]["cases"]) == {*naming.GIVEN, *naming.GIVEN.values()} for m in naming.MODES)


@pytest.mark.slow
def test_recording_is_measured_in_both_modes(tmp_path):
    found = quick("recording", tmp_path / "a.json", seconds=300)
    (modes,) = found["shapes"].values()
    assert set(modes) == {"rounds", "evaluation", "training"}
    assert modes["training"]["counted"] < max(modes["training"]["recorded / plain"]["median"], 1.001)

"""The benchmark scripts run from end to end on tiny models, and count what they say they count."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.bench import decode, mixed, peers, scaling
from eval.bench.peers import Size
from eval.bench.step import training_step
from tests.training.runs import ROOT


def run(module, path, *arguments):
    command = [sys.executable, "-m", module, "--quick", "--output", str(path), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    found = json.loads(path.read_text())
    assert {"machine", "torch", "peft", "threads"} <= set(found["environment"])
    return found


def products(model, inputs):
    """FLOPs of a training step's matrix products, attention aside."""
    step = training_step(model, inputs)
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))


def test_the_flop_bound_counts_the_products_that_are_executed():
    point = scaling.Point(Size(2, 64, ff=96, heads=4, kv_heads=2, vocab=40), experts=4, rank=4, seq=8)
    tokens, rank = point.samples * point.seq, point.experts * point.rank
    base = peers.frozen_base(point.size, torch.float32)
    inputs = peers.batch(base, point.samples, point.seq)
    frozen, per_rank = scaling.linear_flops(point.size, tokens)
    alone = products(peers.share(base), inputs)
    # `addmm_` has no formula in torch's counter: count those of the wide LoRA, which are the same.
    wide = products(peers.peft_lora(rank)(peers.share(base), None), inputs)
    assert alone == frozen
    assert wide - alone == rank * per_rank
    ours = scaling.flop_bound(point, rank)
    assert 1 < ours < 1 + rank * per_rank / frozen


def test_growth_has_a_bar():
    few, many = ({scaling.MINE: {"median": m}, "FLOP bound": b} for m, b in ((1.0, 1.2), (1.34, 2.1)))
    curve = {8: few, 64: many}
    assert scaling.growth(curve)["met"] is True
    many[scaling.MINE]["median"] = 1.36
    assert scaling.growth(curve)["met"] is False


def test_decoding_bars_hold_for_their_shapes():
    times = {name: [1.0, 1.0] for name in decode.CASES} | {decode.MOLORA: [1.03, 1.03]}
    assert decode.judge("fp32 8 x 512", times)[f"{decode.MOLORA} / {decode.PEFT_WIDE} <= 1.05"] == (
        1.03,
        True,
    )
    assert decode.judge("bf16 2 x 2048", times)[f"{decode.MOLORA} / {decode.PEFT_WIDE} <= 1.0"] == (
        1.03,
        False,
    )


@pytest.mark.slow
def test_decode_runs_eager_and_compiled(tmp_path):
    assert set(run("eval.bench.decode", tmp_path / "a.json")["shapes"]) == set(decode.QUICK_SHAPES)
    found = run("eval.bench.decode", tmp_path / "b.json", "--compile", "--shapes", "quick")
    assert set(found["shapes"]["quick compiled"]["cases"]) == set(decode.COMPILED)


@pytest.mark.slow
def test_scaling_runs_and_draws(tmp_path):
    found = run("eval.bench.scaling", tmp_path / "a.json")
    assert set(found["curves"]) == {panel.title for panel in scaling.QUICK_PANELS}
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_panels_that_are_not_measured_keep_their_curves_and_dates(tmp_path):
    assert scaling.earlier(tmp_path / "a.json", scaling.PANELS) == ({}, {})
    committed = scaling.common.RESULTS / "scaling.json"
    curves, dates = scaling.earlier(committed, scaling.PANELS)
    assert set(curves) == set(dates) == {panel.title for panel in scaling.PANELS}
    assert all(tuple(curves[panel.title]) == panel.values for panel in scaling.PANELS)
    assert scaling.earlier(committed, scaling.PANELS[:1]) == (
        {"experts (r=8)": curves["experts (r=8)"]},
        {"experts (r=8)": dates["experts (r=8)"]},
    )


@pytest.mark.slow
def test_mixed_batches_run_in_every_mode(tmp_path):
    found = run("eval.bench.mixed", tmp_path / "a.json")["shapes"]
    assert set(found) == {"quick, 8 experts", "quick, 64 experts"}
    assert all(set(mixed.MODES) < set(shape) for shape in found.values())


def test_a_mixed_batch_gives_every_sample_its_own_task():
    model = mixed.mixture(peers.frozen_base(Size(1, 32, vocab=32), torch.float32), 64).eval()
    inputs = peers.batch(peers.frozen_base(Size(1, 32, vocab=32), torch.float32), mixed.SAMPLES, 2)
    tasks = mixed.tasks_of(64)
    with torch.no_grad():
        together = model(**inputs, routing_task_ids=tasks).logits
        alone = model(inputs_embeds=inputs["inputs_embeds"][5:6], routing_task_ids=tasks[5]).logits
    assert len(set(tasks)) == mixed.SAMPLES
    torch.testing.assert_close(together[5:6], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["startup", "ddp"])
def test_start_up_and_data_parallel_run(tmp_path, name):
    assert run(f"eval.bench.{name}", tmp_path / "a.json")

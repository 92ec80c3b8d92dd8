"""Every precision on a CUDA device: losses near float32's, gates and experts float32, by hand and by Lightning."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from eval import gpu_precision
from eval.gpu_precision import PRECISIONS, REFERENCE
from molora.models.build import load_trained
from molora.training.train import train
from tests.training.runs import adapter_weights, recipe_for, write_base

pytestmark = pytest.mark.gpu
STEPS = 200


def run(name: str, device: str) -> dict[str, Any]:
    try:
        return gpu_precision.precision_run(name, device, STEPS, quick=True)
    except ImportError as error:  # no bitsandbytes
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(device: str) -> dict[str, Any]:
    return run(REFERENCE, device)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_learns_like_float32(name: str, device: str, reference: dict[str, Any]) -> None:
    row = run(name, device)
    assert all(gpu_precision.judge_run(row).values()), row
    if name != REFERENCE:
        assert gpu_precision.is_near(row, reference, PRECISIONS[name].bound), (row, reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_twenty_steps_of_lightning(tmp_path: Path, device: str, precision: str, dtype: str) -> None:
    base = write_base(tmp_path / "base")
    accelerator = "gpu" if device == "cuda" else device
    recipe = recipe_for(
        base, tmp_path / "runs", max_steps=20, log_every=1, precision=precision, accelerator=accelerator
    )
    recipe["base"] = {"model": str(base), "dtype": dtype}
    run = train(recipe)
    with (run.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert all(torch.tensor(float(row["loss"])).isfinite() for row in rows)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    weights = adapter_weights(run.adapter)
    assert any("gate" in name for name in weights)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in weights.values())


def test_the_gate_computes_in_float32_under_autocast(tmp_path: Path, device: str) -> None:
    base = write_base(tmp_path / "base")
    model, tokenizer, _ = load_trained(train(recipe_for(base, tmp_path / "runs")).path)
    model.to(device).train()
    inputs = {name: value.to(device) for name, value in tokenizer("copy(ab)=ab", return_tensors="pt").items()}
    with torch.autocast(device, dtype=torch.float16):
        model(**inputs, labels=inputs["input_ids"])
    assert {value.dtype for value in molora.aux_losses(model).values()} == {torch.float32}

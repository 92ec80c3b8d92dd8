"""Mixed precision on a CUDA device: losses stay finite and fall, gates and experts stay float32."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import molora
from molora.training.build import load_trained
from molora.training.train import train
from tests.training.runs import adapter_weights, recipe_for, write_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_twenty_steps_of_mixed_precision(tmp_path: Path, precision: str, dtype: str) -> None:
    base = write_base(tmp_path / "base")
    recipe = recipe_for(
        base, tmp_path / "runs", max_steps=20, log_every=1, precision=precision, accelerator="gpu"
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


def test_the_gate_computes_in_float32_under_autocast(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model, tokenizer, _ = load_trained(train(recipe_for(base, tmp_path / "runs", accelerator="gpu")).path)
    model.to("cuda").train()
    inputs = {name: value.to("cuda") for name, value in tokenizer("copy(ab)=ab", return_tensors="pt").items()}
    with torch.autocast("cuda", dtype=torch.float16):
        model(**inputs, labels=inputs["input_ids"])
    assert {value.dtype for value in molora.aux_losses(model).values()} == {torch.float32}

"""train() end to end on tiny bases: what a run folder holds, settings that change how it trains, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import load_recipe
from molora.errors import ConfigError
from molora.models.build import load_trained
from molora.store.runs import Run
from molora.training.optimise import check_device, total_steps
from molora.training.train import train
from tests.pictures import drawn
from tests.training.runs import adapter_weights, recipe_for


def metrics(run: Run) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def classification(encoder: Path, output: Path, data: Path) -> dict[str, Any]:
    rows = [
        {"text": word * 3, "label": label}
        for label, word in (("a", "ax"), ("b", "bo"), ("c", "ci"))
        for _ in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "source": "jsonl",
        "kind": "classification",
        "train": str(data),
        "eval": str(data),
        "labels": ["a", "b", "c"],
    }
    recipe = recipe_for(encoder, output, max_steps=30, lr=0.02)
    recipe["base"] = {"model": str(encoder), "task_type": "SEQ_CLS"}
    recipe["data"]["tasks"] = {"letters": task}
    return recipe


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `trained` is."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def trained(base: Path, output: Path) -> Run:
    """A run of eight steps, with its pictures."""
    with drawn():
        return train(recipe_for(base, output, val_every=4))


def test_a_run_folder_is_complete(base: Path, output: Path, trained: Run) -> None:
    run = trained
    assert run.path == Run.find(output / "small" / "latest").path
    assert load_recipe(run.path / "config.yaml") == load_recipe(recipe_for(base, output, val_every=4))
    assert json.loads((run.path / "env.json").read_text())["versions"]["torch"] == torch.__version__
    rows = metrics(run)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert {"loss", "aux/balance", "grad_norm", "lr", "tokens_per_second", "val_loss"} < rows[-1].keys()
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (run.path / "loss.png").stat().st_size > 1000
    assert [path.name for path in run.checkpoints] == ["step-000008"]
    assert (run.path / "report.json").is_file()


def test_a_trained_run_loads_for_inference(trained: Run) -> None:
    run = trained
    model, tokenizer, config = load_trained(run.path)
    assert config == run.config
    assert model.task_ids == {"copy": 0, "reverse": 1}
    assert not model.training
    inputs = tokenizer("copy(ab)=", return_tensors="pt")
    alone, _, no_config = load_trained(run.adapter)
    assert no_config is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, alone(**inputs).logits)


def test_a_classifier_trains_its_head_and_loads_with_it(encoder: Path, tmp_path: Path) -> None:
    run = train(classification(encoder, tmp_path, tmp_path / "letters.jsonl"))
    rows = metrics(run)
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    assert any("classifier" in name for name in adapter_weights(run.adapter))
    resumed = train(classification(encoder, tmp_path, tmp_path / "letters.jsonl"), resume=True)
    for folder in (run.path, resumed.adapter):
        model, _, _ = load_trained(folder)
        assert model.config.num_labels == 3


def test_epochs_count_every_batch(base: Path, tmp_path: Path) -> None:
    run = train(recipe_for(base, tmp_path, max_steps=None, epochs=2, accumulate=2, log_every=1))
    assert len(metrics(run)) == 6  # 5 batches an epoch are 3 steps


def test_other_ways_to_compute_train_alike(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path, max_steps=3, log_every=1)
    recipe["adapter"]["lora_dropout"] = 0.0
    plain = train(recipe)
    for settings in ({"gradient_checkpointing": True}, {"precision": "bf16-mixed"}):
        other = train({**recipe, "name": "other", "train": {**recipe["train"], **settings}})
        for one, two in zip(metrics(plain), metrics(other), strict=True):
            assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=0.02), settings
        assert all(value.dtype == torch.float32 for value in adapter_weights(other.adapter).values())


def test_a_bfloat16_base_keeps_float32_experts(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path)
    recipe["base"] = {"model": str(base), "dtype": "bfloat16"}
    run = train(recipe)
    assert float(metrics(run)[-1]["loss"]) < float(metrics(run)[0]["loss"])
    assert all(value.dtype == torch.float32 for value in adapter_weights(run.adapter).values())


def test_early_stopping_ends_the_run_and_a_resumed_one_stays_ended(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        base, tmp_path, max_steps=50, val_every=1, patience=2, lr=1e-9, schedule="constant", warmup=0
    )
    run = train(recipe)
    # A rate of nothing: the first validation is the best, the second and third are no better.
    losses = [row["val_loss"] for row in metrics(run)]
    steps = int(metrics(run)[-1]["step"])
    assert steps < 50
    assert len(losses) == steps
    train(recipe, resume=True)
    assert int(metrics(run)[-1]["step"]) == steps


def test_a_finished_run_can_be_lengthened(base: Path, tmp_path: Path) -> None:
    train(recipe_for(base, tmp_path, max_steps=4))
    run = train(recipe_for(base, tmp_path, max_steps=8), resume=True)
    assert [row["step"] for row in metrics(run)] == ["2", "4", "6", "8"]
    assert run.config.train.max_steps == 8


def test_bad_input_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path / "runs")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a", ')
    tasks = {"broken": {"source": "jsonl", "train": str(broken)}}
    missing = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    for change, words in (
        ({"train": {**recipe["train"], "precision": "16-mixed", "accelerator": "cpu"}}, "16-mixed"),
        (
            {"train": {**recipe["train"], "accelerator": missing}},
            "finds no such device. On this machine: auto, cpu",
        ),
        ({"base": str(tmp_path / "nowhere")}, "cannot load"),
        ({"adapter": {"target_modules": ["no_such_module"]}}, "no_such_module"),
        ({"data": {**recipe["data"], "tasks": tasks}}, r"broken\.jsonl:2"),
    ):
        with pytest.raises(Exception, match=words) as caught:
            train({**recipe, **change})
        assert caught.value.exit_code in (2, 3)
    assert not (tmp_path / "runs").exists()


def test_validation_needs_held_out_records(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "target": "b"}\n')
    recipe = recipe_for(base, tmp_path / "runs", val_every=2)
    recipe["data"]["tasks"] = {"only": {"source": "jsonl", "train": str(data)}}
    with pytest.raises(ConfigError, match="no task has held-out records"):
        train(recipe)
    assert not (tmp_path / "runs").exists()
    assert train({**recipe, "train": {**recipe["train"], "val_every": None}}).adapter.is_dir()


def test_an_output_that_cannot_be_written_is_refused_first(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a folder"):
        train({**recipe_for(base, tmp_path / "file" / "runs"), "base": "no/such/base"})


def test_resuming_nothing_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="small"):
        train(recipe_for(base, tmp_path), resume=True)


def test_devices_share_the_batches_of_an_epoch() -> None:
    def steps(**settings: Any) -> int:
        return total_steps(load_recipe({**recipe, "train": settings}).train, 10)

    recipe = {
        "name": "x",
        "base": "b",
        "data": {"tasks": {"copy": {"source": "synthetic", "generator": "copy"}}},
    }
    assert steps(epochs=2) == 20
    assert steps(epochs=2, accumulate=3) == 8
    assert steps(epochs=2, devices=4) == 6
    assert steps(max_steps=7, devices=4) == 7
    with pytest.raises(ConfigError, match="16-mixed"):
        check_device(
            load_recipe(
                {**recipe, "train": {"max_steps": 1, "precision": "16-mixed", "accelerator": "cpu"}}
            ).train
        )

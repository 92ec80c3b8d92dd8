"""Two CPU processes train one run: one folder, idle experts included, resumed bit-exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from molora.cli.options import show_run
from molora.evaluation.report import Report
from molora.store.runs import Run
from tests.training.runs import adapter_weights, assert_same_weights, finish, recipe_for, start


def recipe(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"devices": 2, "accelerator": "cpu", "strategy": "ddp", "schedule": "constant", "warmup": 0}
    made = recipe_for(
        base, output, **{**settings, "max_steps": 4, "save_every": 2, "val_every": 2, **changes}
    )
    # One task decides alone in most batches, so one expert or the other is idle there.
    made["adapter"] = {"num_experts": 2, "r": 2, "lora_dropout": 0.1, "gate": {"kind": "task"}}
    made["train"]["batch_size"] = 2
    made["eval"]["modes"] = ["task"]
    return made


def only_run(output: Path) -> Run:
    folders = [path for path in (output / "small").iterdir() if path.is_dir() and not path.is_symlink()]
    assert len(folders) == 1
    return Run(folders[0])


@pytest.mark.slow
def test_two_processes_train_one_run(base: Path, tmp_path: Path) -> None:
    finish(start(recipe(base, tmp_path)))
    run = only_run(tmp_path)
    assert [path.name for path in run.checkpoints] == ["step-000002", "step-000004"]
    assert all(value.isfinite().all() for value in adapter_weights(run.adapter).values())
    assert (run.path / "report.json").is_file()


def test_only_the_first_process_shows_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(Report().to_json())
    show_run(tmp_path)
    assert "report.html" in capsys.readouterr().out
    (tmp_path / "report.json").unlink()  # the first is still scoring
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    show_run(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_two_processes_resume_bit_exactly(base: Path, tmp_path: Path) -> None:
    finish(start(recipe(base, tmp_path / "full")))
    finish(start(recipe(base, tmp_path / "parts", max_steps=2)))
    finish(start(recipe(base, tmp_path / "parts"), resume=True))
    assert_same_weights(only_run(tmp_path / "full").adapter, only_run(tmp_path / "parts").adapter)


@pytest.mark.slow
def test_sharding_the_base_changes_nothing(base: Path, tmp_path: Path) -> None:
    finish(start(recipe(base, tmp_path / "ddp")))
    finish(start(recipe(base, tmp_path / "parts", strategy="fsdp2", max_steps=2)))
    finish(start(recipe(base, tmp_path / "parts", strategy="fsdp2"), resume=True))
    replicated, sharded = only_run(tmp_path / "ddp"), only_run(tmp_path / "parts")
    assert (sharded.path / "report.json").is_file()
    for name, value in adapter_weights(replicated.adapter).items():
        assert torch.allclose(value, adapter_weights(sharded.adapter)[name], atol=1e-5), name

"""Training in memory: the same weights as a run's, and nothing on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molora.config import load_recipe
from molora.data.module import MoLoraDataModule
from molora.models.build import build_model, tasks_of
from molora.training.environment import prepare_process
from molora.training.module import MoLoraModule
from molora.training.optimise import optimise
from molora.training.train import train
from tests.training.runs import recipe_for


def test_without_a_folder_the_weights_are_those_of_a_run_and_nothing_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(base, tmp_path / "runs", max_steps=3)
    run = train(recipe)
    config = load_recipe(recipe)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    prepare_process(config.seed)
    tasks = tasks_of(config)
    model, tokenizer = build_model(config, tasks.ids)
    data = MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed)
    trainer = optimise(model, data, config.train)
    assert trainer.global_step == 3 and not list(empty.iterdir())
    expected = load_file(run.adapter / "adapter_model.safetensors")
    found = MoLoraModule(model, config.train).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

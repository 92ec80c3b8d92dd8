"""Bases are loaded as the recipe says, mixtures built on them, and what cannot work is explained."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from molora.config import BaseConfig, load_recipe
from molora.errors import AdapterError, ConfigError
from molora.models import base as bases
from molora.models.base import load_base
from molora.models.build import build_model, load_trained
from molora.training.train import train
from tests.training.runs import recipe_for


def test_a_base_is_loaded_in_its_dtype_with_a_pad_token(base: Path, tmp_path: Path) -> None:
    unpadded = shutil.copytree(base, tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(unpadded)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(unpadded)
    model, tokenizer = load_base(BaseConfig(model=str(unpadded), dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.pad_token == "<eos>"
    assert model.config.pad_token_id == tokenizer.eos_token_id
    assert not model.training


def test_a_mixture_has_the_recipes_tasks_and_trains_nothing_else(base: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe_for(base, tmp_path))
    model, _ = build_model(config, {"copy": 4, "reverse": 7})
    assert model.task_ids == {"copy": 4, "reverse": 7}
    assert len(model.expert_names) == 3
    assert all("molora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert model.peft_config["default"].base_model_name_or_path == str(base)


def test_experts_can_be_named_per_task(base: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, tmp_path)
    recipe["adapter"]["tasks"] = {"copy": ["expert_0"], "reverse": {"expert_1": 0.7, "expert_2": 0.3}}
    model, _ = build_model(load_recipe(recipe), {"copy": 0, "reverse": 1})
    assert model.tasks["reverse"] == {"expert_1": 0.7, "expert_2": 0.3}


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_base_that_cannot_be_loaded_is_explained(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "base"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"base\.model: cannot load") as caught:
        load_base(BaseConfig(model=str(folder)))
    assert "molora/tiny" in str(caught.value)


def test_quantisation_names_its_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"molora\[quant\]"):
        load_base(BaseConfig(model=str(base), quantization="nf4"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra `quant`")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_trains_with_validation_in_between(
    base: Path, tmp_path: Path, quantization: str
) -> None:
    recipe: dict[str, Any] = recipe_for(base, tmp_path, max_steps=6, val_every=2, accelerator="cpu")
    recipe["base"] = {"model": str(base), "quantization": quantization}
    run = train(recipe)
    model, _, _ = load_trained(run.path)
    assert all(bank.isfinite().all() for name, bank in model.named_parameters() if "molora_experts" in name)
    moved = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)


def test_a_run_without_an_adapter_is_explained(base: Path, tmp_path: Path) -> None:
    run = train(recipe_for(base, tmp_path, max_steps=1))
    shutil.rmtree(run.adapter)
    with pytest.raises(AdapterError):
        load_trained(run.path)
    with pytest.raises(ConfigError):
        load_trained(tmp_path / "nothing here")

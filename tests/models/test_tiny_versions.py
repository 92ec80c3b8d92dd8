"""The embedded base has versions: recipes mean the newest, adapters and runs the one they were trained on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import molora
from molora.assets import NEWEST, TINY_VERSIONS
from molora.config import BaseConfig, load_recipe
from molora.config.load import dump_recipe
from molora.errors import ConfigError
from molora.models.base import load_base
from molora.store.runs import Run
from tests.config.recipes import small
from tests.zoo import randomise

RUNS = Path(__file__).parents[1] / "fixtures_v1" / "training"


def embeddings(version: str | None) -> torch.Tensor:
    given = {"model": "molora/tiny"} if version is None else {"model": "molora/tiny", "revision": version}
    return load_base(BaseConfig.model_validate(given))[0].get_input_embeddings().weight


def test_each_version_has_weights_of_its_own_and_the_newest_is_meant() -> None:
    assert torch.equal(embeddings(None), embeddings(NEWEST))
    assert NEWEST == "v2"
    assert not torch.equal(embeddings("v1"), embeddings("v2"))


def test_a_recipe_keeps_the_version_it_was_read_with(tmp_path: Path) -> None:
    config = load_recipe(small())
    dump_recipe(config, tmp_path / "config.yaml")
    assert f"revision: {NEWEST}" in (tmp_path / "config.yaml").read_text()
    assert load_recipe(tmp_path / "config.yaml") == config


def test_recipes_of_runs_from_before_there_were_versions_mean_the_first() -> None:
    for run in RUNS.iterdir():
        assert "revision: null" in next(run.glob("*/config.yaml")).read_text()
        assert Run.find(run).config.base.revision == "v1"


def test_an_adapter_from_before_there_were_versions_loads_on_the_first(tmp_path: Path) -> None:
    adapter = next((RUNS / "finished").glob("*/adapter"))
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] is None
    model, _ = molora.load(adapter)
    assert torch.equal(model.get_input_embeddings().weight.cpu(), embeddings("v1"))
    molora.save(model, tmp_path / "again")
    assert molora.load(tmp_path / "again")[0] is not None


@pytest.mark.parametrize("version", TINY_VERSIONS)
def test_an_adapter_remembers_the_version(tmp_path: Path, version: str) -> None:
    base, _ = load_base(BaseConfig(model="molora/tiny", revision=version))
    config = molora.MoLoraConfig(num_experts=2, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path)
    model, _ = molora.load(tmp_path)
    assert torch.equal(model.get_input_embeddings().weight.cpu(), embeddings(version))


def test_a_config_put_on_another_base_forgets_the_version(tmp_path: Path) -> None:
    config = molora.MoLoraConfig(num_experts=2, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for version in TINY_VERSIONS:
        base, _ = load_base(BaseConfig(model="molora/tiny", revision=version))
        model = get_peft_model(base, config)
        assert model.active_peft_config.revision == version


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"base\.revision: molora/tiny has no version 'v3'.*Allowed: v1, v2"
    ):
        load_recipe(small(), ["base.revision=v3"])


def test_a_hub_name_keeps_no_revision() -> None:
    assert BaseConfig(model="some/model").revision is None


def test_a_lora_that_names_another_version_is_composed_with_a_warning(tmp_path: Path) -> None:
    first, _ = load_base(BaseConfig(model="molora/tiny", revision="v1"))
    config = molora.MoLoraConfig(num_experts=1, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(first, config)
    randomise(model)
    molora.export_lora(model, tmp_path / "lora", expert="expert_0")
    second, _ = load_base(BaseConfig(model="molora/tiny"))
    with pytest.warns(UserWarning, match="lora was trained on revision v1 of molora/tiny, and this is v2"):
        molora.compose(second, {"one": tmp_path / "lora"})
    again, _ = load_base(BaseConfig(model="molora/tiny", revision="v1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        molora.compose(again, {"one": tmp_path / "lora"})

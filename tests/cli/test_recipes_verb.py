"""`molora recipes`: list, show and copy, from a checkout and from an installed wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Cli, fresh

NAMES = sorted(path.stem for path in (ROOT / "recipes").rglob("*.yaml"))


def test_list_shows_each_with_its_purpose(cli: Cli) -> None:
    lines = cli("recipes", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split()) > 4 for line in lines)


def test_show_prints_the_file(cli: Cli) -> None:
    assert cli("recipes", "show", "quickstart").out == (ROOT / "recipes" / "quickstart.yaml").read_text(
        encoding="utf-8"
    )


def test_keys_of_one_section(cli: Cli) -> None:
    shown = cli("recipes", "keys", "adapter.router")
    assert shown.out.startswith("adapter.router: Who names the task")
    assert "  soft: true or false; default false\n      the experts of all tasks" in shown.out
    assert "max_steps" not in shown.out
    wrong = cli("recipes", "keys", "tran")
    assert wrong.code == 2 and "Did you mean 'train'?" in wrong.err


def test_an_unknown_name_suggests_the_nearest(cli: Cli) -> None:
    result = cli("recipes", "show", "quikstart")
    assert result.code == 2
    assert "Did you mean 'quickstart'?" in result.err


def test_copy_into_a_folder_or_to_a_name(cli: Cli, tmp_path: Path) -> None:
    original = (ROOT / "recipes" / "soft_mixture.yaml").read_bytes()
    assert cli("recipes", "copy", "soft_mixture", tmp_path).code == 0
    assert cli("recipes", "copy", "soft_mixture.yaml", tmp_path / "mine.yaml").code == 0
    assert (tmp_path / "soft_mixture.yaml").read_bytes() == (tmp_path / "mine.yaml").read_bytes() == original


def test_copy_goes_to_the_current_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("recipes", "copy", "quickstart").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]


def test_copy_replaces_only_when_forced(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "quickstart.yaml"
    mine.write_text("mine", encoding="utf-8")
    result = cli("recipes", "copy", "quickstart", tmp_path)
    assert result.code == 2
    assert "--force" in result.err
    assert mine.read_text(encoding="utf-8") == "mine"
    assert cli("recipes", "copy", "quickstart", tmp_path, "--force").code == 0
    assert mine.read_text(encoding="utf-8") != "mine"


def test_copy_to_nowhere_is_refused(cli: Cli, tmp_path: Path) -> None:
    assert cli("recipes", "copy", "quickstart", tmp_path / "no" / "such.yaml").code == 2


def test_an_interrupted_copy_leaves_the_old_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "quickstart.yaml"
    mine.write_text("mine", encoding="utf-8")

    def fail(descriptor: int) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr("molora.disk.atomic.os.fsync", fail)
    assert cli("recipes", "copy", "quickstart", tmp_path, "--force").code == 1
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_name_is_no_path(cli: Cli) -> None:
    assert cli("recipes", "show", "../recipes/quickstart").code == 2


def test_an_installed_wheel_has_recipes_base_and_types(tmp_path: Path) -> None:
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("molora", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("molora-*.whl")
    zipfile.ZipFile(wheel).extractall(site)

    code = "import molora; print(molora.__file__); from molora.cli.main import main; main(['recipes', 'copy', 'quickstart'])"
    done = fresh(code, elsewhere, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert (elsewhere / "quickstart.yaml").read_bytes() == (ROOT / "recipes" / "quickstart.yaml").read_bytes()
    assert sorted(path.stem for path in (site / "molora" / "recipes").rglob("*.yaml")) == NAMES
    assert (site / "molora" / "py.typed").is_file()
    for path in (ROOT / "molora" / "assets").rglob("*.*"):
        if "__pycache__" not in path.parts:
            assert (site / path.relative_to(ROOT)).is_file(), path

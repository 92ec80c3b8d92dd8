"""Which folders may be replaced: new ones, empty ones, and those that hold only what molora wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molora.disk.atomic import check_target, write_folder
from molora.disk.manifest import MANIFEST, foreign_entries, write_manifest
from molora.errors import ConfigError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder of ours with a file, a card and a file in a folder."""
    with write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
        (folder / "README.md").write_text("card")
        (folder / "sub").mkdir()
        (folder / "sub" / "y").write_text("y")
    return tmp_path / "f"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(target: Path, match: str, *sources: Path) -> None:
    """The rule says so, and so does the writer, before its block runs; nothing changes on the disk."""
    around = target.absolute().parent
    before = tree(around)
    with pytest.raises(ConfigError, match=match) as error:
        check_target(target, *sources)
    assert error.value.hint is not None
    if not sources:
        with pytest.raises(ConfigError, match=match), write_folder(target):
            pytest.fail("the block must not run")
    assert tree(around) == before


def test_new_and_empty_folders_and_our_own_are_written(written: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (written / "README.md").write_text("a card that somebody edited")
    (written / "x").write_text("damaged")
    for name in ("new", "a/b/new", "empty", "f"):
        with write_folder(tmp_path / name) as folder:
            (folder / "z").write_text("z")
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [MANIFEST, "z"]


def test_the_rule_alone_creates_nothing(tmp_path: Path) -> None:
    assert check_target(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "add",
    ["notes.txt", "sub/notes.txt", "data/notes.txt", ".git/config", ".env", "sub/README.md", "sub/MANIFEST.json"],
)  # fmt: skip
def test_a_file_added_to_a_folder_of_ours_is_never_deleted(written: Path, add: str) -> None:
    (written / add).parent.mkdir(exist_ok=True)
    (written / add).write_text("mine")
    named = add if (written / add).parent in (written, written / "sub") else add.split("/")[0] + "/"
    assert foreign_entries(written) == [named]
    refused(written, rf"holds what molora did not write.*: {named}\.")


def test_an_empty_folder_and_a_link_added_to_a_folder_of_ours_are_named(
    written: Path, tmp_path: Path
) -> None:
    (written / "kept").mkdir()
    (written / "link").symlink_to(tmp_path)
    assert foreign_entries(written) == ["kept/", "link/"]
    refused(written, r": kept/, link/\.")


def test_at_most_five_entries_are_named(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / "models" / f"m{i}").mkdir(parents=True)
    refused(tmp_path / "models", r": m0/, m1/, m2/, m3/, m4/ and 2 more\.")


@pytest.mark.parametrize("manifest", [None, "", "{}", '{"files": {"x": {}, "sub/y": {}}}', '["x"]', "\0"])
def test_without_a_manifest_of_ours_all_is_foreign(written: Path, manifest: str | None) -> None:
    if manifest is None:
        (written / MANIFEST).unlink()
    else:
        (written / MANIFEST).write_text(manifest)
    expected = ["README.md", "sub/", "x"] if manifest is None else [MANIFEST, "README.md", "sub/", "x"]
    assert foreign_entries(written) == expected
    refused(written, "did not write")


def test_a_manifest_of_some_files_does_not_speak_for_the_others(tmp_path: Path) -> None:
    """PEFT's save_pretrained writes into a folder that may hold more."""
    for name in ("adapter_config.json", "mine"):
        (tmp_path / name).write_text("{}")
    write_manifest(tmp_path, only=["adapter_config.json"])
    assert not json.loads((tmp_path / MANIFEST).read_text())["complete"]
    assert foreign_entries(tmp_path) == ["mine"]


def test_files_and_links_are_refused(written: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file, not a folder")
    for name, to in (("link", written), ("to file", tmp_path / "file"), ("dangling", tmp_path / "none")):
        (tmp_path / name).symlink_to(to)
        refused(tmp_path / name, "is a symbolic link")
    (tmp_path / "inside").symlink_to(tmp_path, target_is_directory=True)
    assert check_target(tmp_path / "inside" / "f") == tmp_path / "inside" / "f"  # only the last part may not


@pytest.mark.parametrize("spelled", [".", "..", "../..", "../sub", "../../f", "deeper/..", "new/..", "/"])
def test_the_working_folder_and_its_parents_are_refused(
    written: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    """Even inside a folder that molora wrote, where every entry is its own."""
    monkeypatch.chdir(written / "sub")
    before = tree(written)
    if spelled == "deeper/..":
        (written.parent / "elsewhere").mkdir()
        monkeypatch.chdir(written.parent / "elsewhere")
        Path("deeper").mkdir()
    with pytest.raises(ConfigError, match="the working folder"), write_folder(spelled):
        pytest.fail("the block must not run")
    assert tree(written) == before


def test_sources_and_their_parents_are_refused(written: Path, tmp_path: Path) -> None:
    refused(written, "is the source", written)
    refused(written, "holds the source", written / "sub")
    (tmp_path / "link").symlink_to(written / "sub")
    refused(written, "holds the source", tmp_path / "link")
    assert check_target(written / "new", written) == written / "new"
    assert check_target(written, tmp_path / "f2", written / "not there") == written


def test_what_appears_while_the_block_runs_is_kept(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"late\.txt"), write_folder(written) as folder:
        (folder / "new").write_text("new")
        (written / "late.txt").write_text("mine")
    assert (written / "late.txt").read_text() == "mine" and (written / "x").read_text() == "x"
    assert [p.name for p in written.parent.iterdir()] == ["f"]


def test_a_working_folder_that_is_gone_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "f" / "x").is_file()
    monkeypatch.chdir(tmp_path)

"""Folder and file writes: complete or absent, readable by colleagues, recoverable."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from molora.disk import atomic
from molora.disk.atomic import (
    check_writable,
    recover,
    remove_folder,
    sweep,
    write_file,
    write_folder,
    write_json,
)
from molora.disk.manifest import verify_folder
from molora.errors import AdapterError, ConfigError

DEAD = 2**22 + 1  # above the largest process number Linux gives


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_appears_whole_with_its_manifest(tmp_path):
    target = tmp_path / "a" / "folder"
    with write_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    verify_folder(target)
    assert names(target) == ["MANIFEST.json", "x"] and names(tmp_path / "a") == ["folder"]


def test_replacing_leaves_nothing_of_the_old_folder(tmp_path):
    for name in ("x", "y"):
        with write_folder(tmp_path / "f") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path / "f") == ["MANIFEST.json", "y"] and names(tmp_path) == ["f"]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_and_no_temporary(tmp_path, exception):
    with write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(exception), write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
        raise exception
    assert (tmp_path / "f" / "x").read_text() == "old" and names(tmp_path) == ["f"]


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    with write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    monkeypatch.setattr(atomic, "finish_folder", lambda folder: folder.rename(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError), write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "f" / "x").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_of_the_umask(tmp_path, umask):
    previous = os.umask(umask)
    try:
        with write_folder(tmp_path / "f") as folder:
            save_file({"x": torch.zeros(2)}, folder / "x.safetensors")
    finally:
        os.umask(previous)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "f").iterdir()}
    assert modes == {0o666 & ~umask}


def test_recover_puts_an_orphaned_old_folder_back(tmp_path):
    aside = tmp_path / f"f.old-{DEAD}-0123abcd"
    aside.mkdir()
    (aside / "x").write_text("old")
    assert (recover(tmp_path / "f") / "x").read_text() == "old" and names(tmp_path) == ["f"]
    assert recover(tmp_path / "never") == tmp_path / "never"


def test_writing_and_sweeping_recover_too(tmp_path):
    (tmp_path / f"f.old-{DEAD}-0123abcd").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["f"]


def test_sweep_removes_only_what_no_living_process_writes(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / f"f.tmp-{DEAD}-0123abcd").mkdir()
    (tmp_path / f"g.tmp-{os.getpid()}-0123abcd").mkdir()  # our number, but a former process
    (tmp_path / f"h.tmp-{os.getppid()}-0123abcd").mkdir()  # alive
    (tmp_path / f"i.tmp-{DEAD}-0123abcd").write_text("a file")
    with write_folder(tmp_path / "j") as ours:
        sweep(tmp_path)
        assert names(tmp_path) == sorted([f"h.tmp-{os.getppid()}-0123abcd", "keep", ours.name])
        assert atomic._LEFTOVER.fullmatch(ours.name)


def test_sweep_removes_a_link_and_leaves_what_it_points_to(tmp_path):
    (tmp_path / "kept").mkdir()
    for number, to in enumerate(("kept", "nowhere")):
        (tmp_path / f"latest.tmp-1234567-0000000{number}").symlink_to(to)
    assert len(sweep(tmp_path)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_a_folder_whose_removal_is_interrupted_is_whole_or_swept(tmp_path, monkeypatch):
    with write_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("x")
    with monkeypatch.context() as patched:
        patched.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
        remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["file", "file/below"])
def test_a_target_that_cannot_be_a_folder_is_refused_before_the_work(tmp_path, target):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"not a folder|cannot write"), write_folder(tmp_path / target):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            check_writable(tmp_path / "f")
    finally:
        tmp_path.chmod(0o700)


def test_too_large_a_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(AdapterError, match="are needed"), write_folder(tmp_path / "f", size=2**60):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_write_file_replaces(tmp_path):
    for data in (b"old", b"new"):
        write_file(tmp_path / "x", data)
    write_json(tmp_path / "y.json", {"name": "é"})
    assert (tmp_path / "x").read_bytes() == b"new" and "é" in (tmp_path / "y.json").read_text("utf-8")
    assert names(tmp_path) == ["x", "y.json"]


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from molora.errors import AdapterError
from molora.disk.atomic import write_file, write_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
target = Path(sys.argv[1])
try:
    if sys.argv[2] == "folder":
        with write_folder(target) as folder:
            save_file({"x": torch.zeros(100_000)}, folder / "x")
    else:
        write_file(target / "x", bytes(200_000))
except AdapterError as error:
    assert "no room to write" in str(error) and "bytes" in str(error), error
    sys.exit(4)
"""


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_full_disk_is_explained_and_leaves_the_old_folder(tmp_path, what):
    with write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    child = subprocess.run(
        [sys.executable, "-c", DISK_FULL, tmp_path / "f", what], capture_output=True, text=True
    )
    assert child.returncode == 4, child.stderr
    assert (tmp_path / "f" / "x").read_text() == "old" and names(tmp_path) == ["f"]
    verify_folder(tmp_path / "f")


def test_a_folder_where_a_file_is_to_be_written_is_named(tmp_path):
    (tmp_path / "report.csv").mkdir()
    with pytest.raises(ConfigError, match=r"report\.csv is a folder, and a file is to be written there"):
        write_file(tmp_path / "report.csv", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["report.csv"]

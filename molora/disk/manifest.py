"""MANIFEST.json: the size and sha256 of every file of a folder, written last and checked first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from molora.errors import AdapterError, ConfigError

MANIFEST = "MANIFEST.json"
FORMAT = 1
FREE = ("README.md",)
"""Files for people, which may be edited: not in the manifest. Hidden files are not either."""


def write_manifest(folder: Path, only: Sequence[str] | None = None) -> None:
    """List every file below `folder` with its size and sha256, or those in `only`; then others may be added later."""
    files = _listed(folder)
    entries = {name: _entry(files[name]) for name in (files if only is None else only)}
    manifest = {"format": FORMAT, "complete": only is None, "files": entries}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_folder(path: str | os.PathLike[str]) -> None:
    """Compare a folder with its manifest.

    Raises AdapterError where there is no manifest, or files are missing, extra, or not the bytes that were written;
    it names every such file, damaged ones with the expected and the actual sha256.
    """
    folder = Path(path)
    manifest, actual = _read(folder), _listed(folder)
    expected = manifest["files"]
    problems = [f"{name}: missing" for name in expected if name not in actual]
    if manifest.get("complete", True):
        problems += [f"{name}: not in the manifest" for name in actual if name not in expected]
    for name, wanted in expected.items():
        if name in actual and wanted != (found := _entry(actual[name])):
            problems.append(
                f"{name}: damaged\n"
                f"    expected sha256 {wanted.get('sha256')}, {wanted.get('bytes')} bytes\n"
                f"    actual   sha256 {found['sha256']}, {found['bytes']} bytes"
            )
    if problems:
        raise AdapterError(
            f"{folder} is not as it was written:\n  " + "\n  ".join(problems),
            hint=f"copy the folder again, or use an earlier one; if a change was meant, delete {MANIFEST}.",
        )


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has a manifest and agrees with it."""
    try:
        verify_folder(path)
    except AdapterError:
        return False
    return True


def foreign_entries(folder: Path) -> list[str]:
    """Entries that molora did not write: all but the manifest and what it lists; folders end in "/".

    README.md, the model card, is ours even if edited; hidden files are foreign, though checking ignores them.
    Without a readable manifest everything is foreign. Raises ConfigError where the folder cannot be read.
    """
    foreign: list[str] = []
    ours: set[str] = set()
    try:
        with suppress(AdapterError):
            ours = {MANIFEST, *FREE, *_read(folder)["files"]}
        for parent, folders, files in os.walk(folder, onerror=_raise):
            prefix = "" if Path(parent) == folder else Path(parent).relative_to(folder).as_posix() + "/"
            below = [name for name in folders if any(f.startswith(f"{prefix}{name}/") for f in ours)]
            foreign += [f"{prefix}{name}/" for name in folders if name not in below]
            foreign += [f"{prefix}{name}" for name in files if f"{prefix}{name}" not in ours]
            folders[:] = below
    except OSError as error:
        raise ConfigError(
            f"cannot read {folder}: {error.strerror}.", hint="choose another folder."
        ) from error
    return sorted(foreign)


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> Any:
    """The content of a JSON file; AdapterError where it is missing or not JSON."""
    if file.exists() and not file.is_file():
        raise AdapterError(f"{file} is not a file.", hint="copy the folder again.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{file} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}.", hint="copy the file again.") from error


def _raise(error: OSError) -> None:
    raise error


def _entry(file: Path) -> dict[str, Any]:
    if not file.is_file():  # reading might wait for ever; a link may lead nowhere
        what = "a pipe or a device" if file.exists() else "a link that leads nowhere"
        raise AdapterError(f"{file} is {what}, not a file.", hint="copy the folder again.")
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise AdapterError(f"{folder} has no {MANIFEST}: it is incomplete or was not written by molora.")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise AdapterError(f"{folder / MANIFEST} is not a manifest: no table of files.")
    if manifest.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, this molora reads {FORMAT}.",
            hint="update molora.",
        )
    return manifest


def _listed(folder: Path) -> dict[str, Path]:
    """Every file that the manifest covers: relative posix name -> path."""
    listed = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            relative = str(PurePosixPath(Path(parent, name).relative_to(folder)))
            if relative not in (MANIFEST, *FREE) and not name.startswith("."):
                listed[relative] = Path(parent, name)
    return listed

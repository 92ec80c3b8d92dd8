"""Atomic writes: a folder or file is either complete or absent, whatever interrupts the writing."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from molora.disk.manifest import MANIFEST, foreign_entries, write_manifest
from molora.errors import NO_SPACE, AdapterError, ConfigError

_LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-[0-9a-f]{8}")
_DAY = 86_400.0
# What this process is writing: in a container another run may have the same pid.
_open: set[Path] = set()


@contextmanager
def write_folder(path: str | os.PathLike[str], *, size: int = 0) -> Iterator[Path]:
    """Yield a temporary sibling folder; at the end of the block it takes the place of `path`.

    Then it gets its MANIFEST.json (last), its files the permissions of the umask (safetensors writes 0600), everything
    reaches the disk, and it is renamed. An existing folder (see `check_target` for which) is renamed aside first and
    deleted last; a crash between the two renames leaves `path` missing and the old folder aside, which `recover` puts
    back. On any exception the temporary is removed and `path` stays. `size` bytes are about to be written; refused at
    once if they do not fit.

    Raises:
        ConfigError: the target cannot be written, or may not be replaced (checked before the block runs).
        AdapterError: the disk is full.
    """
    target = check_target(path)
    check_writable(target)
    sweep(target.parent)
    if size > (free := shutil.disk_usage(target.parent).free):
        raise AdapterError(
            f"{target.parent} has {free:,} bytes free, {size:,} are needed.",
            hint="free some space or write elsewhere.",
        )
    with _temporary(target) as temporary:
        temporary.mkdir()
        with _explain_no_space(target, temporary):
            yield temporary
            finish_folder(temporary)
        check_target(target)  # again: the block may have taken a long time
        _swap(temporary, target)


def finish_folder(folder: Path) -> None:
    """Write the manifest, set permissions by the umask and flush every file and folder to the disk."""
    write_manifest(folder)
    mode = (folder / MANIFEST).stat().st_mode & 0o777  # a file created by Python follows the umask
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(parent, name)
            file.chmod(mode)
            _flush(file)
        _flush(Path(parent))


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Create or replace one file atomically; readers see the old bytes or the new ones. ConfigError where a folder is."""
    target = Path(path).absolute()
    if target.is_dir():
        raise ConfigError(f"{target} is a folder, and a file is to be written there.", hint="move it away.")
    with _temporary(target) as temporary:
        with _explain_no_space(target, temporary), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _flush(target.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def recover(path: str | os.PathLike[str]) -> Path:
    """Return `path`, after restoring it if a crash came between the two renames of a replacement."""
    target = Path(path).absolute()
    deadline = time.monotonic() + 2.0
    while not target.exists():
        aside = [old for old in _leftovers(target.parent) if (old.kind, old.name) == ("old", target.name)]
        if not aside:
            break
        if any(old.in_use() for old in aside) and time.monotonic() < deadline:
            time.sleep(0.01)  # the writer is alive and about to rename
            continue
        max((old.path for old in aside), key=lambda path: path.stat().st_mtime).rename(target)
        _flush(target.parent)
    return target


def sweep(parent: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed writers left in `parent` and return it; leaves live writers alone."""
    removed = []
    for old in _leftovers(Path(parent)):
        if old.kind == "old":
            recover(old.path.with_name(old.name))
        if not old.in_use() and os.path.lexists(old.path):
            _remove(old.path)
            removed.append(old.path)
    return removed


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Delete a folder; one that is killed meanwhile leaves it whole, or a leftover that `sweep` removes."""
    target = Path(path).absolute()
    with _temporary(target) as leftover:
        target.rename(leftover)


def check_target(path: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> Path:
    """The absolute `path`, if a folder may be written there: a new one, an empty one, or one molora wrote.

    Replacing deletes what was there. So a folder that molora wrote must still hold only what its manifest
    lists, and its README.md. Nothing is written here: call this before the expensive work. `sources` are folders
    the content is made from, such as the run of an exported expert; they need not exist.

    Raises ConfigError for a file or a symbolic link, another folder that is not empty, the working folder or a
    source, or a folder that holds one of these.
    """
    target = Path(path).absolute()
    if target.name in ("", ".."):
        target = target.resolve()
    if target.is_symlink():
        raise ConfigError(
            f"{target} is a symbolic link, which is not replaced.",
            hint=f"give the folder it points to, {target.resolve()}, or another one.",
        )
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file, not a folder.", hint="choose another output folder.")
    kept = [("the source", Path(source).resolve()) for source in sources if Path(source).exists()]
    with suppress(FileNotFoundError):  # the working folder may have been deleted
        kept.insert(0, ("the working folder", Path.cwd().resolve()))
    real = target.resolve()
    for what, folder in kept:
        if real == folder or real in folder.parents:
            relation = f"is {what}" if real == folder else f"holds {what} {folder}"
            raise ConfigError(
                f"{target} {relation}; writing there would delete it.", hint="choose a new folder."
            )
    if target.is_dir() and (foreign := foreign_entries(target)):
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ConfigError(
            f"{target} holds what molora did not write, and writing there would delete it: "
            f"{', '.join(foreign[:5])}{more}.",
            hint="choose a new or empty folder, or one that molora wrote and nothing was added to.",
        )
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError unless a folder can be made (or renamed) at `path`; creates its parent folders."""
    target = Path(path).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = _sibling(target, "tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write to {target.parent}: {error.strerror}.",
            hint="choose another output folder, or change its permissions.",
        ) from error


def _swap(temporary: Path, target: Path) -> None:
    recover(target)
    aside = None
    if target.exists():
        aside = _sibling(target, "old")
        _open.add(aside)
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    finally:
        _open.discard(aside or target)
    _flush(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name beside `target` that counts as in use; what is there in the end is removed."""
    temporary = _sibling(target, "tmp")
    _open.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _open.discard(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _Leftover(NamedTuple):
    """A temporary ("tmp") or an old folder put aside ("old"), of the writer with that pid."""

    path: Path
    name: str  # of what it was to become, or was
    kind: str
    pid: int

    def in_use(self) -> bool:
        if self.pid == os.getpid():
            return self.path in _open
        try:
            age = time.time() - self.path.lstat().st_ctime  # renaming a folder sets ctime only
        except FileNotFoundError:
            return False
        return _alive(self.pid) and age < _DAY  # after a day the pid belongs to another process


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _leftovers(parent: Path) -> list[_Leftover]:
    if not parent.is_dir():
        return []
    found = [(entry, _LEFTOVER.fullmatch(entry.name)) for entry in sorted(parent.iterdir())]
    return [_Leftover(path, m["name"], m["kind"], int(m["pid"])) for path, m in found if m]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explain_no_space(target: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error(error)
        if number not in NO_SPACE:
            raise
        files = [temporary, *temporary.rglob("*")]
        written = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(target.parent).free
        raise AdapterError(
            f"no room to write {target}: {os.strerror(number)} after {written:,} bytes "
            f"({free:,} free on the disk). What was there before is unchanged.",
            hint="free some space, raise the quota, or write elsewhere.",
        ) from error


def _os_error(error: SafetensorError) -> int:
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else 0

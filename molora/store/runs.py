"""Run: the folder of one training, found by any of its names and written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from molora.config import RunConfig, load_recipe
from molora.config.names import check_name
from molora.disk.atomic import check_writable, sweep, write_file
from molora.disk.manifest import is_complete, read_json
from molora.errors import AdapterError, ConfigError

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.json"
ENVIRONMENT_FILE = "env.json"
FORMAT = 1  # of a run folder; see env.json
LATEST = "latest"
LOCK_FILE = ".lock"
_VERBS = {"continual": "continual", "federate": "federated"}  # by the section of a recipe that only they read
_held: set[Path] = set()  # locks held by this process: the kernel only locks out other processes


@dataclass(frozen=True)
class Run:
    """One run folder, `<output>/<name>/<stamp>`; everything is read when it is first needed."""

    path: Path

    @classmethod
    def create(cls, output: str | os.PathLike[str], name: str) -> Run:
        """Make a new, empty folder `<output>/<name>/<stamp>` and point `<output>/<name>/latest` at it.

        Raises ConfigError where the name breaks the name rule, the folder cannot be written, or `latest` is no link.
        """
        parent = Path(output).absolute() / check_name(name, "run")
        check_writable(parent / "run")
        if (link := parent / LATEST).is_dir() and not link.is_symlink():
            raise ConfigError(
                f"{link} is a folder, where the link to the newest run belongs.",
                hint="remove it: it is a copy of a run beside it, of when the folder was copied with its links followed.",
            )
        stamp, tries = time.strftime("%Y%m%d-%H%M%S"), 1
        while True:
            path = parent / (stamp if tries == 1 else f"{stamp}-{tries:02d}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                tries += 1
        _point_latest(parent, path.name)
        return cls(path)

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> Run:
        """The run at a run folder, `<output>/<name>` (its latest) or `<output>/<name>/latest`; else a ConfigError."""
        given = Path(path).absolute()
        if (given / CONFIG_FILE).is_file():
            return cls(given.resolve())
        parent = given.parent if given.name == LATEST else given
        pointed = _read_latest(parent)
        stamped = sorted(file.parent.resolve() for file in parent.glob(f"*/{CONFIG_FILE}"))
        found = [pointed] if pointed is not None else stamped
        if not found:
            what = "is not a run folder" if given.exists() else "does not exist"
            raise ConfigError(
                f"{path} {what}: no {CONFIG_FILE} in it and no run below it.{_runs_near(parent)}",
                hint="give a run folder, or the folder of a run's name; `molora train` prints where it writes.",
            )
        return cls(found[-1])

    @cached_property
    def config(self) -> RunConfig:
        """The resolved recipe the run was started with; AdapterError for a run of a newer format."""
        environment = self.path / ENVIRONMENT_FILE
        found = read_json(environment) if environment.is_file() else {}
        written = (
            found.get("format", FORMAT) if isinstance(found, dict) else None
        )  # the first runs do not say
        if written != FORMAT:
            raise AdapterError(
                f"{environment} has format {written!r}, this molora reads {FORMAT}.", hint="update molora."
            )
        return load_recipe(self.path / CONFIG_FILE)

    @property
    def adapter(self) -> Path:
        """Where the trained adapter is, or will be."""
        return self.path / "adapter"

    @property
    def trained_adapter(self) -> Path:
        """The trained adapter; AdapterError where there is none yet."""
        if not self.adapter.is_dir():
            verb = next(
                (verb for verb, key in _VERBS.items() if getattr(self.config, key) is not None), "train"
            )
            raise AdapterError(
                f"{self.path} has no adapter yet: its training has not finished.",
                hint=f"molora {verb} RECIPE --resume",
            )
        return self.adapter

    @property
    def checkpoints(self) -> list[Path]:
        """Undamaged checkpoints `checkpoints/step-N`, by step."""
        return [path for path in checkpoints(self.path / "checkpoints") if is_complete(path)]

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint."""
        return latest_valid(self.path / "checkpoints")

    @property
    def report(self) -> dict[str, Any] | None:
        """The content of report.json, or None before the first evaluation."""
        file = self.path / REPORT_FILE
        return read_json(file) if file.is_file() else None

    @property
    def evaluations(self) -> Path:
        """Where `molora eval` writes, a numbered folder each time."""
        return self.path / "evaluations"

    @property
    def reports(self) -> list[Path]:
        """That of its training first, then those of evaluations, newest first."""
        numbered = [
            entry for entry in self.evaluations.glob("*") if entry.name.isascii() and entry.name.isdigit()
        ]
        folders = [self.path, *sorted(numbered, key=lambda entry: -int(entry.name))]
        return [folder / REPORT_FILE for folder in folders if (folder / REPORT_FILE).is_file()]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process from writing into the run meanwhile; AdapterError where one is writing already.

        What killed writers left in it, and beside it, is removed first.
        The kernel drops the lock when its process dies, so one left by a killed run never blocks.
        """
        file = self.path / LOCK_FILE
        if file in _held:
            raise AdapterError(f"{self.path} is already being written by this process.")
        with file.open("a+", encoding="utf-8") as stream:
            _acquire(stream, self.path)
            _held.add(file)
            try:
                for folder in (self.path.parent, self.path, self.path / "checkpoints"):
                    sweep(folder)
                stream.truncate(0)
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, stream)
                stream.flush()
                yield
                stream.truncate(0)
            finally:
                _held.discard(file)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, damaged ones included."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def latest_valid(folder: Path) -> Path | None:
    """The newest undamaged checkpoint: after damage an older one is better than none."""
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)


def checkpoint_step(path: Path | None) -> int:
    """The step a checkpoint folder was written at; 0 for none."""
    return 0 if path is None else int(path.name.removeprefix("step-"))


def load_run(path: str | os.PathLike[str]) -> Run:
    """The run at `path`; see `Run.find`."""
    return Run.find(path)


def _acquire(stream: TextIO, run: Path) -> None:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        stream.seek(0)
        try:
            owner = json.load(stream)
            who = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        raise AdapterError(
            f"{run} is being written by {who}.", hint="wait for it, or start a new run."
        ) from error


def _point_latest(parent: Path, stamp: str) -> None:
    """A relative symbolic link, so that `latest/report.html` opens; a text file where links do not exist."""
    link = parent / LATEST
    temporary = parent / f"{LATEST}.tmp-{os.getpid()}-00000000"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(stamp, target_is_directory=True)
    except OSError:
        write_file(link, stamp.encode())
    else:
        temporary.replace(link)


def _read_latest(parent: Path) -> Path | None:
    pointer = parent / LATEST
    with suppress(OSError, ValueError, RuntimeError):  # not text, or no name: then there is no pointer
        if pointer.is_file():
            pointer = parent / Path(pointer.read_text(encoding="utf-8").strip()).name
        return pointer.resolve() if (pointer / CONFIG_FILE).is_file() else None
    return None


def _runs_near(folder: Path) -> str:
    """The runs beside a mistyped path, which may be the one meant."""
    names = sorted({file.parent.parent.name for file in folder.parent.glob(f"*/*/{CONFIG_FILE}")})
    return f" Runs in {folder.parent}: {', '.join(names[:10])}." if names else ""

"""All runs below a folder: what each has come to, and what of it can go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from molora.disk.atomic import sweep
from molora.errors import AdapterError, ConfigError, DataError
from molora.store.runs import CONFIG_FILE, REPORT_FILE, Run, checkpoint_step, checkpoints

MATRIX_FILE = "matrix.json"
FINISHED, TRAINED, UNFINISHED, WRITING = "finished", "not scored", "unfinished", "being written"


@dataclass(frozen=True)
class RunState:
    """One run: its folder, how far it came, its mean score (of the first mode it was scored in) and its size in bytes."""

    run: Run
    state: str
    step: int
    score: float | None
    size: int

    @property
    def name(self) -> str:
        """`<name>/<time>`."""
        return f"{self.run.path.parent.name}/{self.run.path.name}"


@dataclass(frozen=True)
class Removal:
    """A folder that `clean` would remove, and why."""

    path: Path
    why: str
    size: int


def runs_below(folder: Path) -> list[Run]:
    """Every run in `<folder>/<name>/<time>`, by name and time; ConfigError where there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder.", hint="give the folder that recipes name as `output`.")
    found = {file.parent for file in folder.glob(f"*/*/{CONFIG_FILE}") if not file.parent.is_symlink()}
    return [Run(path.absolute()) for path in sorted(found)]


def state_of(run: Run) -> RunState:
    """What has become of a run; reads its small files only."""
    locked = False
    try:
        with run.lock():
            pass
    except AdapterError:
        locked = True
    except OSError:  # not ours to write, so not ours to ask
        pass
    report = None
    with suppress(AdapterError):
        report = run.report
    kept = checkpoints(run.path / "checkpoints")
    newest = max((path.stat().st_mtime for path in kept), default=0.0)
    # A finished run that was lengthened, and interrupted then, still has the report of its first end.
    done = report is not None and (run.path / REPORT_FILE).stat().st_mtime >= newest
    if run.config.continual is not None:
        done = (run.path / MATRIX_FILE).is_file()
    state = WRITING if locked else FINISHED if done else TRAINED if run.adapter.is_dir() else UNFINISHED
    step = max(map(checkpoint_step, kept), default=0)
    return RunState(run, state, step, _score(report), _size(run.path))


def removals(states: list[RunState], *, unfinished: bool) -> Iterator[Removal]:
    """What can go: all checkpoints but the newest of finished runs, and, if asked for, runs without an adapter.

    The newest one stays: from it `--resume` can lengthen a run.
    """
    for state in states:
        if state.state == FINISHED:
            for kept in state.run.path.glob("**/checkpoints"):  # a sequence has those of its stages
                for path in checkpoints(kept)[:-1]:
                    yield Removal(path, "older checkpoint of a finished run", _size(path))
        elif unfinished and state.state == UNFINISHED:
            yield Removal(state.run.path, "unfinished run", state.size)


def remove(found: list[Removal]) -> None:
    """Delete what `removals` found, and what killed writers left beside it."""
    for removal in found:
        with suppress(FileNotFoundError):
            shutil.rmtree(removal.path)
        sweep(removal.path.parent)


def _score(report: object) -> float | None:
    rows = report.get("scores") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows:
        return None
    with suppress(KeyError, TypeError, DataError):
        shares = [row["value"] for row in rows if row["mode"] == rows[0]["mode"] and row["metric"] != "loss"]
        return sum(shares) / len(shares) if shares else None
    return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())

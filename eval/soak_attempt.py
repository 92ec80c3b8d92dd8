"""One attempt of `eval.soak`: a verb in a forked process, which says where it is and is killed at a chosen moment.

The parent has imported everything and has one thread, so a fork starts in milliseconds instead of many seconds.
"""

from __future__ import annotations

import gc
import importlib
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

MODULES = "modules.txt"  # what an uninterrupted attempt had imported in the end
ROOT = Path(__file__).parents[1]
STARTING = "starting"
TRAINING = "training"
# phase -> the functions that are it, by where they are looked up
PHASES: dict[str, tuple[str, ...]] = {
    TRAINING: ("molora.training.train:optimise",),
    "validating": ("molora.training.callbacks:Validation.loss",),
    "writing a checkpoint": ("molora.training.checkpoint:Checkpoints.save",),
    "saving the adapter": (
        "molora.training.train:save",
        "molora.continual.turn:save",
        "molora.continual.turns:TurnsRun._publish",
    ),
    "scoring": (
        "molora.training.evaluate:score",
        "molora.continual.grow:score",
        "molora.continual.turns:score_turn",
        "molora.continual.turns:score_base",
    ),
    "writing the report": (
        "molora.training.evaluate:write_report",
        "molora.continual.grow:write_report",
        "molora.continual.sequence:write_tables",
    ),
}
BETWEEN = "between these"
NAMES = [STARTING, *PHASES, BETWEEN]
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.chmod", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE = 300.0  # seconds an attempt may take


@dataclass(frozen=True)
class Kill:
    """A signal after so many seconds, or before the file operation of that number."""

    number: int
    seconds: float | None = None
    operation: int | None = None
    rank: int = 0  # whose process it is; 0 also takes those it started along


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended. `code` is negative for a signal, `saved` the last checkpoint that was wholly written."""

    code: int
    phase: str
    seconds: float
    operations: int
    saved: Path | None
    hung: bool


class Board:
    """Memory that parent and child share: the phase, the number of file operations, the last checkpoint."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8192)

    def write(self, phase: int, operations: int) -> None:
        """Note where the child is."""
        struct.pack_into("<qq", self._memory, 0, phase, operations)

    def write_saved(self, path: str) -> None:
        """Note a checkpoint that is complete."""
        data = path.encode()
        self._memory[32 : 32 + len(data)] = data
        struct.pack_into("<q", self._memory, 16, len(data))

    def read(self) -> tuple[str, int, Path | None]:
        """What the child noted last."""
        phase, operations, length = struct.unpack_from("<qqq", self._memory, 0)
        saved = self._memory[32 : 32 + length].decode()
        return NAMES[phase], operations, Path(saved) if saved else None


class Watch:
    """In the child: keeps the board, and carries out a kill that waits for a file operation."""

    def __init__(self, board: Board, folder: Path, kill: Kill | None) -> None:
        self.board, self.folder, self.kill = board, str(folder), kill
        self.phase, self.operations, self.owner = 0, 0, os.getpid()

    def start(self) -> None:
        """Wrap the functions of the phases and hear every file operation."""
        for number, (phase, places) in enumerate(PHASES.items(), 1):
            for place in places:
                self._wrap(place, number, phase == "writing a checkpoint")
        sys.addaudithook(self._hear)

    def _wrap(self, place: str, number: int, saves: bool) -> None:
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        real: Callable[..., Any] = getattr(owner, name)

        @wraps(real)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            before, self.phase = self.phase, number
            self.board.write(self.phase, self.operations)
            try:
                found = real(*arguments, **keywords)
            finally:
                self.phase = before or NAMES.index(BETWEEN)
                self.board.write(self.phase, self.operations)
            if saves:
                self.board.write_saved(str(found))
            return found

        setattr(owner, name, watched)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES and (event != "open" or not self._writes(*arguments)):
            return
        if os.getpid() != self.owner:  # a loader's worker
            return
        self.operations += 1
        self.board.write(self.phase, self.operations)
        if self.kill is not None and self.operations == self.kill.operation:
            os.kill(self.owner, self.kill.number)

    def _writes(self, path: Any, mode: Any, flags: Any) -> bool:
        if not isinstance(path, str) or not os.path.abspath(path).startswith(self.folder):
            return False
        return any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)


def run_attempt(folder: Path, arguments: list[str], kill: Kill | None = None) -> Attempt:
    """Run `molora <arguments>` in `folder` until it ends or is killed; nothing of it is left running."""
    board, began = Board(), time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_child(board, folder, arguments, kill)
    code, hung = _wait(child, kill, began)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started: workers, the other rank
    return Attempt(code, board.read()[0], time.monotonic() - began, *board.read()[1:], hung)


def _wait(child: int, kill: Kill | None, began: float) -> tuple[int, bool]:
    sent = kill is None or kill.seconds is None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), False
        passed = time.monotonic() - began
        if not sent and kill is not None and kill.seconds is not None and passed >= kill.seconds:
            sent = _send(child, kill)
        if passed > _PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, True
        time.sleep(0.005)


def _send(child: int, kill: Kill) -> bool:
    """Whether the signal could be sent: another rank may not be there yet."""
    if kill.rank == 0:
        os.kill(child, kill.number)
        return True
    started = Path(f"/proc/{child}/task/{child}/children").read_text(encoding="utf-8").split()
    for pid in started[kill.rank - 1 : kill.rank]:
        os.kill(int(pid), kill.number)
    return len(started) >= kill.rank


def _be_child(board: Board, folder: Path, arguments: list[str], kill: Kill | None) -> None:
    """Run the verb as its own program would be; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("attempt.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print("$ molora", *arguments, flush=True)
        # Lightning starts the other ranks with the command line of the first.
        spec = importlib.import_module("molora.cli.main").__spec__
        sys.modules["__main__"].__spec__ = spec
        sys.argv[1:] = arguments
        os.environ["PYTHONPATH"] = str(ROOT)
        Watch(board, folder, kill).start()
        from molora.cli.main import main

        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001  (a forked process must not go back into its parent's code)
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):  # a stream that is gone
            if kill is None:
                Path(MODULES).write_text(" ".join(sys.modules), encoding="utf-8")
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def import_everything(modules: list[str]) -> None:
    """Import what verbs import, so that no attempt has to; a garbage collection then touches none of it."""
    for name in modules:
        with suppress(ImportError):  # names of no file, such as six.moves
            importlib.import_module(name)
    gc.collect()
    gc.freeze()

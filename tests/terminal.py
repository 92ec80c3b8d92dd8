"""Commands under a real pseudo-terminal, and what they leave on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TOKEN = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|9\d)(?:;\d+)*m")
COUNTED = re.compile(r"[━╸╺]\s+\d+/\d+ (?:\d+:\d\d:\d\d|-:--:--)$")
"""What a bar ends with: itself, the count, the time that remains."""


@dataclass
class Shown:
    """What a command wrote to its terminal, as written, and its exit code."""

    output: str
    code: int

    @property
    def pictures(self) -> list[list[str]]:
        """The screen before every redrawing, and at the end."""
        return pictures(self.output)

    @property
    def lines(self) -> list[str]:
        """The screen at the end."""
        return self.pictures[-1]

    def bars(self, name: str) -> list[str]:
        """Every state of the bar whose line starts so."""
        return [
            line for picture in self.pictures for line in picture if line.startswith(name) and "━" in line
        ]


def pictures(output: str) -> list[list[str]]:
    """What is written as a terminal of endless height shows it; it must erase nothing but whole lines."""
    screen, row, column, found = [""], 0, 0, []
    for token in _TOKEN.finditer(output):
        number, command, move, text = token.groups()
        if text is not None:
            line = screen[row].ljust(column)
            screen[row] = line[:column] + text + line[column + len(text) :]
            column += len(text)
        elif move == "\r":
            column = 0
        elif move == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K":
            found.append([line.rstrip() for line in screen if line.strip()])
            screen[row] = ""
        else:
            assert command in "mhl", f"unexpected control sequence {token.group()!r}"
    return [*found, [line.rstrip() for line in screen if line.strip()]]


def in_terminal(
    command: Sequence[str],
    *,
    columns: int = 80,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    stop: Callable[[str], bool] | None = None,
) -> Shown:
    """Run a command whose input and output are a terminal; Ctrl-C is pressed once `stop` of what it wrote is true."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {
        k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI")
    }
    process = subprocess.Popen(
        command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**kept, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(environment or {})},
    )  # fmt: skip
    os.close(theirs)
    written, until = b"", time.monotonic() + 300
    while time.monotonic() < until:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the last process that had the terminal open has ended
            break
        if not read:
            break
        written += read
        if stop is not None and stop(written.decode(errors="replace")):
            os.killpg(process.pid, signal.SIGINT)
            stop = None
    os.close(ours)
    return Shown(written.decode(), process.wait(timeout=60))

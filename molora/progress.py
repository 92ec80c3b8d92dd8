"""What is going on and how long it still takes: bars on a terminal, plain lines in a file or a pipe.

Work says which phase it is in (`phase`) and counts; whether and how that is shown is decided once, by whoever opens
`shown`. Outside of it, and in other threads, a phase costs nothing and says nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LASTS = 1.0  # seconds after which a minor phase is worth a bar
EVERY = 30.0  # seconds between lines where nothing else is said
_PER_SECOND = 4  # how often bars are drawn
_SHOW_CURSOR = b"\x1b[?25h"


@dataclass(eq=False)
class Phase:
    """A phase while it lasts. `total` is None where nobody knows it; `minor` ones are shown only if they last."""

    name: str
    total: int | None
    unit: str
    minor: bool
    display: Display | None
    done: int = 0
    detail: str = ""
    text: str = ""
    start: float = field(default_factory=time.monotonic)

    def reach(self, done: int) -> None:
        """So much of `total` is done."""
        self.done = done
        if self.display is not None:
            self.display.moved(self)

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.reach(self.done + count)

    def now(self, detail: str) -> None:
        """What of the phase is being done."""
        self.detail = detail
        self.reach(self.done)

    def tell(self, news: str, whole: str | None = None) -> None:
        """Show numbers: as a line the new ones, below the bar the newest of all (default: the same)."""
        self.text = news if whole is None else whole
        if self.display is not None:
            self.display.told(self, news)

    @property
    def title(self) -> str:
        """`evaluating pig, gate alone`."""
        return f"{self.name} {self.detail}".rstrip()


class Display(Protocol):
    """A way to show phases; `phases` are those that are open, the innermost last, `said` what `say` has said."""

    phases: list[Phase]
    said: set[str]

    def begun(self, phase: Phase) -> None: ...
    def moved(self, phase: Phase) -> None: ...
    def told(self, phase: Phase, news: str) -> None: ...
    def ended(self, phase: Phase) -> None: ...
    def say(self, line: str) -> None: ...


_display: ContextVar[Display | None] = ContextVar("display", default=None)
_live = False  # whether bars are on the terminal, of any thread


@contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Show the phases entered meanwhile on stderr, unless that is done already; `wanted`: False in a second process."""
    if not wanted or _display.get() is not None:
        yield
        return
    console = Console(file=sys.stderr, highlight=False)
    bars = sys.stderr.isatty() and console.is_interactive and not console.is_dumb_terminal
    token = _display.set(Bars(console) if bars else Lines())
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def phase(name: str, total: int | None, unit: str, *, done: int = 0, minor: bool = False) -> Iterator[Phase]:
    """A phase of the work: `total` (of which `done` are done) of the plural noun `unit`."""
    display = _display.get()
    opened = Phase(name, total, unit, minor, display, done)
    if display is None:
        yield opened
        return
    display.phases.append(opened)
    try:
        display.begun(opened)
        yield opened
    finally:
        display.ended(opened)
        display.phases.remove(opened)


def advance(count: int, unit: str) -> None:
    """So much more is done in the innermost phase, if that is what it counts."""
    display = _display.get()
    if display is not None and display.phases and display.phases[-1].unit == unit:
        display.phases[-1].advance(count)


def say(line: str) -> None:
    """A line, once, about what begins now and has no count."""
    display = _display.get()
    if display is not None and line not in display.said:
        display.said.add(line)
        display.say(line)


def give_back_terminal() -> None:
    """Show the cursor again where the process is about to end without any clearing up."""
    if _live:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _SHOW_CURSOR)


class Lines:
    """Plain lines without control characters: a phase, its numbers, and how far it is every `EVERY` seconds."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.said: set[str] = set()
        self._last = time.monotonic()

    def begun(self, phase: Phase) -> None:
        if not phase.minor:
            within = "".join(
                f"{outer.title}: " for outer in self.phases if outer is not phase and outer.detail
            )
            size = "" if phase.total is None else f": {phase.total} {phase.unit}"
            self.say(f"{within}{phase.title}{size}")

    def moved(self, phase: Phase) -> None:
        if time.monotonic() - self._last >= EVERY:
            self.say(f"{phase.title}: {phase.done}/{phase.total or '?'} {phase.unit}")

    def told(self, phase: Phase, news: str) -> None:
        self.say(f"{phase.unit.removesuffix('s')} {phase.done}/{phase.total or '?'}  {news}")

    def ended(self, phase: Phase) -> None:
        pass

    def say(self, line: str) -> None:
        self._last = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class Bars:
    """A bar with count and remaining time for every open phase, the newest numbers below.

    The outermost phase's last bar stays; those within it go with their phase.
    """

    def __init__(self, console: Console) -> None:
        self.phases: list[Phase] = []
        self.said: set[str] = set()
        self._console = console
        self._progress: _Progress | None = None
        self._bars: dict[Phase, TaskID] = {}

    def begun(self, phase: Phase) -> None:
        if not phase.minor:
            self._show(phase)

    def moved(self, phase: Phase) -> None:
        if phase not in self._bars:
            if time.monotonic() - phase.start < LASTS:
                return
            self._show(phase)
        assert self._progress is not None
        self._progress.update(self._bars[phase], completed=phase.done, description=phase.title)

    def told(self, phase: Phase, news: str) -> None:
        if self._progress is not None:
            self._progress.refresh()

    def ended(self, phase: Phase) -> None:
        global _live
        bar = self._bars.pop(phase, None)
        if bar is None or self._progress is None:
            return
        if self._bars or phase.minor:
            self._progress.remove_task(bar)
        if not self._bars:
            self._progress.stop()
            self._progress, _live = None, False

    def say(self, line: str) -> None:
        self._console.print(Text(line, style="dim"))

    def _show(self, phase: Phase) -> None:
        global _live
        if self._progress is None:
            self._progress = _Progress(self.phases, self._console)
            self._progress.start()
            _live = True
        self._bars[phase] = self._progress.add_task(phase.title, total=phase.total, completed=phase.done)


class _Progress(Progress):
    """The bars of phases, and the numbers of the innermost one that has any."""

    def __init__(self, phases: list[Phase], console: Console) -> None:
        self._phases = phases
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=36)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right")),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=_PER_SECOND,
            speed_estimate_period=3600.0,  # a step of a large model may take minutes
            redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe goes on doing so
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        text = next((phase.text for phase in reversed(self._phases) if phase.text), "")
        if text:
            yield Text(text, style="dim")


def _forget() -> None:
    """In a forked child, which has no thread that draws, and may have copied a lock that one holds."""
    global _live
    _display.set(None)
    _live = False
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, stream.rich_proxied_file)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

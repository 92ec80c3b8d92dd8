"""Phases as bars under a real terminal of 80 columns, as plain lines in a pipe, and not at all where nobody asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from molora import progress
from tests.terminal import COLOUR, COUNTED, ROOT, in_terminal

NUMBERS = "loss 5.151  task_label 1.164  grad norm 1.213  tokens/s 1,707  lr 0.0008"
WORK = f"""
import sys, time
from molora import progress
with progress.shown():
    progress.say("loading a base")
    with progress.phase("tasks", 2, "tasks") as tasks:
        for name in ("spell", "a_task_with_quite_a_long_name"):
            tasks.now(name)
            with progress.phase("training", 3, "steps") as training:
                for step in (1, 2, 3):
                    time.sleep(0.15)
                    training.reach(step)
                    if step == 2:
                        training.tell({NUMBERS!r})
                        print("a warning", file=sys.stderr)
                    with progress.phase("validating", 5, "batches", minor=True) as validating:
                        validating.advance()
            with progress.phase("evaluating", 40, "records") as scoring:
                scoring.now("[spell], gate alone")
                for _ in range(4):
                    time.sleep(0.07)
                    progress.advance(10, "records")
                    progress.advance(10, "tasks")
            tasks.advance()
"""
COMMAND = [sys.executable, "-c", WORK]


def test_bars_fit_80_columns_with_count_and_remaining_time() -> None:
    shown = in_terminal(COMMAND)
    assert shown.code == 0, shown.output
    for name in ("tasks", "training", "evaluating"):
        bars = shown.bars(name)
        assert bars and all(COUNTED.search(bar) and len(bar) <= 80 for bar in bars), bars
    assert any("0/3" in bar for bar in shown.bars("training"))  # before the first step is done
    assert any("2/3" in bar and "-:--" not in bar for bar in shown.bars("training"))
    assert shown.bars("evaluating [spell], gate alone")
    assert not shown.bars("validating")  # over before it was worth a bar
    below = [picture[picture.index(NUMBERS) - 1] for picture in shown.pictures if NUMBERS in picture]
    assert below and all(line.startswith(("training", "evaluating")) for line in below)
    # What happened within the outermost phase is gone, what was said stays.
    assert shown.lines[0] == "loading a base" and shown.lines.count("a warning") == 2
    assert len(shown.lines) == 4 and "2/2" in shown.lines[-1]
    assert shown.output.count("\x1b[?25l") == shown.output.count("\x1b[?25h")  # the cursor is back
    assert COLOUR.search(shown.output)


def test_a_narrow_terminal_without_colour_has_the_same_bars() -> None:
    shown = in_terminal(COMMAND, columns=40, environment={"NO_COLOR": "1"})
    bars = [bar for name in ("tasks", "training", "evaluating") for bar in shown.bars(name)]
    assert bars and all(COUNTED.search(bar) and len(bar) <= 40 for bar in bars)
    assert not COLOUR.search(shown.output)


def test_a_pipe_gets_plain_lines() -> None:
    forced = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FORCE_COLOR": "1",
    }  # of rich: even then no bar moves in a file
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=True, env=forced)
    assert done.stdout == ""
    assert done.stderr.splitlines()[:7] == [
        "loading a base",
        "tasks: 2 tasks",
        "tasks spell: training: 3 steps",
        f"step 2/3  {NUMBERS}",
        "a warning",
        "tasks spell: evaluating: 40 records",
        "tasks a_task_with_quite_a_long_name: training: 3 steps",
    ]


def test_a_dumb_terminal_gets_plain_lines() -> None:
    shown = in_terminal(COMMAND, environment={"TERM": "dumb"})
    assert "\x1b" not in shown.output and "step 2/3" in shown.output


def test_long_work_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.shown(), progress.phase("reading", 90, "records", minor=True) as reading:
        for i in range(90):
            now += 1.0
            reading.reach(i + 1)
    assert capsys.readouterr().err.splitlines() == [f"reading: {n}/90 records" for n in (30, 60, 90)]


def test_nobody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown(wanted=False), progress.phase("training", 3, "steps") as training:
        training.reach(2)
        training.tell("loss 1")
        progress.advance(1, "steps")
        progress.say("loading")
        assert training.done == 2
    assert capsys.readouterr() == ("", "")


FORK = """
import os, sys, time
from molora import progress
with progress.shown(), progress.phase("training", 3, "steps"):
    time.sleep(0.3)
    child = os.fork()
    if not child:
        print("from the child", file=sys.stderr, flush=True)
        with progress.phase("reading", 3, "records"):
            os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_forked_child_draws_nothing() -> None:
    shown = in_terminal([sys.executable, "-c", FORK])
    assert "from the child" in shown.output and not shown.bars("reading")


def test_the_cursor_comes_back_where_a_process_ends_at_once() -> None:
    code = "import os\nfrom molora import progress\nwith progress.shown(), progress.phase('a', 1, 'steps'):\n"
    shown = in_terminal([sys.executable, "-c", f"{code}    progress.give_back_terminal()\n    os._exit(130)"])
    assert shown.code == 130 and shown.output.rstrip().endswith("\x1b[?25h")

"""Throws damaged inputs at every reader, time-boxed, and counts what escapes: `python -m eval.fuzz --seconds 150`.

An input must be answered, or refused with one of molora's own errors (exit code 2 to 6, one screen), within 10 seconds and
1 GB. Anything else is an escape: another exception, exit code 1, a hang, a process that dies. Each input comes from its target
and its number alone, so `python -m eval.fuzz --targets runs --first 17 --inputs 1` shows number 17 again. Writes
eval/results/fuzz.json; exit code 1 if anything escaped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from eval.bench.common import environment

RESULT = Path(__file__).parent / "results" / "fuzz.json"
LIMIT_SECONDS, LIMIT_BYTES = 10.0, 2**30
_KINDS_SHOWN = 50


def fuzz(
    targets: Sequence[str] | None = None, *, seconds: float = 150.0, inputs: int | None = None, first: int = 0
) -> dict[str, Any]:
    """Try each target for so many seconds, or so many inputs.

    Returns:
        target -> inputs, exit codes met, slowest input in seconds, most memory in MB above the start, and escapes by kind.
    """
    from eval import fuzz_inputs

    fuzz_inputs.warm_up()
    return {target: _Target(target).run(seconds, inputs, first) for target in targets or fuzz_inputs.TARGETS}


class _Target:
    """One target's inputs, tried one after the other in a child that is replaced when it hangs or dies."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.codes: Counter[str] = Counter()
        self.escapes: dict[str, dict[str, Any]] = {}
        self.slowest = self.memory = 0.0

    def run(self, seconds: float, inputs: int | None, first: int) -> dict[str, Any]:
        end, seed = time.monotonic() + seconds, first
        with tempfile.TemporaryDirectory(prefix="molora-fuzz-") as folder:
            while seed == first or (time.monotonic() < end and (inputs is None or seed < first + inputs)):
                seed = self._by_child(Path(folder), seed, end, None if inputs is None else first + inputs)
        return {
            "inputs": seed - first,
            "codes": dict(sorted(self.codes.items())),
            "slowest_s": round(self.slowest, 2),
            "memory_mb": round(self.memory),
            "escapes": sum(found["count"] for found in self.escapes.values()),
            "kinds": dict([*self.escapes.items()][:_KINDS_SHOWN]),
        }

    def _by_child(self, folder: Path, seed: int, end: float, stop: int | None) -> int:
        """Go on from a seed until time or inputs end, or the child does; returns the next seed."""
        here, there = multiprocessing.get_context("fork").Pipe()
        child = multiprocessing.get_context("fork").Process(target=_child, args=(there, self.name, folder))
        child.start()
        there.close()
        try:
            while time.monotonic() < end and (stop is None or seed < stop):
                here.send(seed)
                if not here.poll(LIMIT_SECONDS):
                    self._note(seed, f"hang: no answer in {LIMIT_SECONDS:.0f} s", "")
                    return seed + 1
                code, kind, shown, took, memory = here.recv()
                self.slowest, self.memory = max(self.slowest, took), max(self.memory, memory / 2**20)
                if kind is None:
                    self.codes[str(code)] += 1
                else:
                    self._note(seed, kind, shown)
                seed += 1
        except (EOFError, ConnectionError):
            self._note(seed, "the process died", "")
            return seed + 1
        finally:
            child.kill()
            child.join()
        return seed

    def _note(self, seed: int, kind: str, shown: str) -> None:
        found = self.escapes.setdefault(kind, {"count": 0, "first": seed, "shown": shown})
        found["count"] += 1


def _child(pipe: Connection, target: str, folder: Path) -> None:
    from eval.fuzz_inputs import Escape, tried

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while True:
        seed = pipe.recv()
        code, kind, shown, start = 0, None, "", time.monotonic()
        try:
            code = tried(target, seed, folder / str(seed))
        except Escape as escape:
            shown = str(escape)
            kind = _kind_of_text(shown)
        except BaseException as error:  # noqa: BLE001  (whatever comes through is what is looked for)
            shown = "".join(traceback.format_exception(error))[-3000:]
            kind = f"{type(error).__name__} at {_place(error)}"
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) * 1024
        pipe.send((code, kind, shown, time.monotonic() - start, memory))


def _place(error: BaseException) -> str:
    """The last line of this package that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}molora{os.sep}" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}"


def _kind_of_text(text: str) -> str:
    """The kind of an escape through the command line: its first line, and the last place and error of a traceback."""
    lines = text.strip().splitlines()
    if not text.startswith("exit code"):
        return lines[0][:120]
    files = [
        line.strip()
        for line in lines
        if line.strip().startswith("File") and f"{os.sep}molora{os.sep}" in line
    ]
    error = next((line for line in lines if line.startswith("internal error")), lines[-1])
    place = files[-1].rpartition(os.sep)[2].replace('", line ', ":") if files else ""
    return f"{lines[0].split(':')[0]}: {error.split(':')[1].strip() if ':' in error else error} at {place}"[
        :160
    ]


def main() -> None:
    """Run, print a line for each target, and write the result where whole runs are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--seconds", type=float, default=150.0, help="for each target")
    parser.add_argument("--inputs", type=int, help="for each target, at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--out", type=Path, help=f"where to write the result; {RESULT.name} is the committed one"
    )
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    begun = time.monotonic()
    found = fuzz(given.targets, seconds=given.seconds, inputs=given.inputs, first=given.first)
    for target, row in found.items():
        print(f"{target}: {row['inputs']} inputs, codes {row['codes']}, {row['escapes']} escapes, "
              f"slowest {row['slowest_s']} s, {row['memory_mb']} MB")  # fmt: skip
        for kind, escape in row["kinds"].items():
            print(f"  {escape['count']} x {kind} (first: {escape['first']})")
            if given.inputs == 1:
                print(escape["shown"])
    if given.out is not None:
        whole = {"seconds": round(time.monotonic() - begun), "targets": found, "environment": environment()}
        given.out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(any(row["escapes"] for row in found.values()))


if __name__ == "__main__":
    main()

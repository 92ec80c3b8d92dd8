"""docs/peft.md: what PEFT's LoRA can do and a mixture can, each tried on tiny models; `python -m eval.peft_page` writes it.

A capability is one function that does it with a method and checks what came out. It works, or it raises: both columns are
the same code, and no cell is written by hand.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eval.peft_trials import METHODS, TRIALS, Method, Trial

PAGE = Path(__file__).parents[1] / "docs" / "peft.md"
START, END = "<!-- made by eval/peft_page.py -->", "<!-- end -->"


class Result(NamedTuple):
    """What came of one capability, by method: nothing, or the error."""

    trial: Trial
    errors: dict[str, Exception | None]


def attempt(trial: Callable[[Method, Path], None], method: Method) -> Exception | None:
    """Do it in a folder of its own; the error, where it does not work."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial(method, Path(folder))
        except Exception as error:  # noqa: BLE001  (whatever stops it: that is the result)
            return error
    return None


def results() -> list[Result]:
    """Every capability, tried with each method."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return [Result(trial, {m.name: attempt(trial.run, m) for m in METHODS}) for trial in TRIALS]


def table(found: list[Result]) -> str:
    """One line per capability: what works with each method, and what to know."""
    lines = ["| | molora | PEFT LoRA | |", "| --- | --- | --- | --- |"]
    for trial, errors in found:
        cells = " | ".join("yes" if errors[method.name] is None else "no" for method in METHODS)
        lines.append(f"| {trial.name} | {cells} | {trial.note} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page, and print why the others do not work."""
    found = results()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table(found)}\n{END}{after}", encoding="utf-8")
    for trial, errors in found:
        for name, error in errors.items():
            if error is not None:
                print(f"{trial.name}: {name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")


if __name__ == "__main__":
    main()

"""`molora continual`: tasks one after another, with the accuracy matrix at the end."""

from __future__ import annotations

from functools import partial
from typing import Any

from molora.cli.options import Overrides, RecipeFile, Resume, ResumeFrom, say_reach


def command(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, resume_from: ResumeFrom = None
) -> None:
    """Train on tasks one after another and measure what is forgotten.

    Example: molora continual recipes/continual_quickstart.yaml continual.strategy=o_lora
    """
    from molora.config import load_recipe
    from molora.config.reach import reach

    config = load_recipe(recipe, overrides or [])
    say_reach(reach(config))

    from molora.continual.sequence import train_sequence
    from molora.disk.manifest import read_json

    run = train_sequence(config, resume=resume_from or resume or None).path
    _print(read_json(run / "matrix.json"), f"run: {run}\nmatrix: {run / 'matrix.png'}")


def _print(found: dict[str, Any], where: str) -> None:
    from molora.continual.tables import VIEWS
    from molora.evaluation.continual import AccuracyMatrix
    from molora.report.tables import console, turn_table

    to = console()
    say = partial(to.print, markup=False)
    for view, plain in found["matrices"].items():
        matrix = AccuracyMatrix.from_dict(plain)
        to.print(turn_table(matrix, VIEWS[view]))
        say(", ".join(f"{name} {100 * v:.1f} %" for name, v in matrix.summary().items() if v is not None))
    if found["task_inference"] is not None:
        say(f"task named rightly: {100 * found['task_inference']:.1f} %")
    if found["overlap"]["mean"] is not None:
        say(f"overlap of the experts' subspaces: {found['overlap']['mean']:.3f}")
    earlier = list(found["unchanged"])[:-1]
    changed = [task for task in earlier if not found["unchanged"][task]]
    if earlier and not found["matrices"]["shown"]["joint"]:
        text = f"logits changed since, with task ids given: {', '.join(changed)}"
        say(text if changed else "logits of every earlier task bit-equal with task ids given")
    say(where)

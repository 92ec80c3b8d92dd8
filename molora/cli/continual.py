"""`molora continual`: tasks one after another, with the accuracy matrix at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from molora.cli.options import Overrides, RecipeFile, Resume, ResumeFrom

if TYPE_CHECKING:
    from rich.console import Console


def command(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, resume_from: ResumeFrom = None
) -> None:
    """Train on tasks one after another and measure what is forgotten.

    Example: molora continual recipes/continual_quickstart.yaml continual.strategy=o_lora
    """
    from molora.config import load_recipe

    config = load_recipe(recipe, overrides or [])

    from molora.continual.sequence import train_sequence
    from molora.disk.manifest import read_json
    from molora.report.tables import console

    done = train_sequence(config, resume=resume_from or resume or None)
    to = console()
    _print(to, read_json(done.path / "matrix.json"))
    to.print(f"run: {done.path}\nmatrix: {done.path / 'matrix.png'}", markup=False)


def _print(to: Console, found: dict[str, Any]) -> None:
    from molora.continual.tables import VIEWS
    from molora.evaluation.continual import AccuracyMatrix
    from molora.report.tables import accuracy_table

    for view, plain in found["matrices"].items():
        matrix = AccuracyMatrix.from_dict(plain)
        to.print(accuracy_table(matrix, VIEWS[view]))
        summary = matrix.summary()
        to.print(
            ", ".join(f"{name} {100 * v:.1f} %" for name, v in summary.items() if v is not None), markup=False
        )
    if found["task_inference"] is not None:
        to.print(f"task named rightly: {100 * found['task_inference']:.1f} %", markup=False)
    if found["overlap"]["mean"] is not None:
        to.print(f"overlap of the experts' subspaces: {found['overlap']['mean']:.3f}", markup=False)
    earlier = list(found["unchanged"])[:-1]
    if not earlier or found["matrices"]["shown"]["joint"]:
        return
    changed = [task for task in earlier if not found["unchanged"][task]]
    to.print(
        f"logits changed since, with task ids given: {', '.join(changed)}"
        if changed
        else "logits of every earlier task bit-equal with task ids given",
        markup=False,
    )

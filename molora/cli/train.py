"""`molora train`: from a recipe to a run folder, with the scores at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from molora.cli.options import Overrides, RecipeFile, Resume, ResumeFrom, say_reach, show_run
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.config import RunConfig


def command(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, resume_from: ResumeFrom = None
) -> None:
    """Train a mixture, evaluate it and write a run folder.

    Example: molora train recipes/quickstart.yaml train.max_steps=100
    """
    run(recipe, overrides or [], resume_from or resume)


def run(recipe: Path, overrides: Sequence[str], resume: bool | Path) -> None:
    """Train and say where the results are. Errors of the recipe are raised before torch is imported."""
    from molora.config import load_recipe
    from molora.config.grow import is_grow
    from molora.config.reach import reach

    if is_grow(recipe):
        raise ConfigError(
            f"{recipe} adds an expert to a trained run; it starts none.",
            hint=f"molora add-expert RUN --recipe {recipe}",
        )
    config = load_recipe(recipe, overrides)
    say_reach(reach(config))

    if config.stages is not None:
        _in_stages(config, resume)
        return

    from molora.training.train import train

    show_run(train(config, resume=resume or None).path)


def _in_stages(config: RunConfig, resume: bool | Path) -> None:
    """Build in stages; the scores after each come before the report of the whole."""
    from molora.continual.stages import train_stages
    from molora.disk.manifest import read_json
    from molora.evaluation.continual import StageScores
    from molora.report.tables import console, turn_table

    done = train_stages(config, resume=resume or None).path
    found = read_json(done / "stages.json")
    to = console()
    to.print(turn_table(StageScores(**found["scores"]), "task ids given"))
    changed = [task for task, same in found["unchanged"].items() if not same]
    text = f"logits changed since their own stage, with task ids given: {', '.join(changed)}"
    to.print(
        text if changed else "logits of earlier stages' tasks bit-equal with task ids given", markup=False
    )
    show_run(done)

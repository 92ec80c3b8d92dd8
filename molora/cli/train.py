"""`molora train`: from a recipe to a run folder, with the scores at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molora.cli.options import Overrides, RecipeFile, Resume, ResumeFrom, say_reach, show_run
from molora.errors import ConfigError


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

    from molora.training.train import train

    show_run(train(config, resume=resume or None).path)

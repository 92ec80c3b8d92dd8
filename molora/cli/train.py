"""`molora train`: from a recipe to a run folder, with the scores at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def run(recipe: Path, overrides: Sequence[str], resume: bool | Path) -> None:
    """Train and say where the results are. Errors of the recipe are raised before torch is imported."""
    from molora.config import load_recipe

    config = load_recipe(recipe, overrides)

    from molora.training.train import train

    trained = train(config, resume=resume or None)
    Console().print(f"run: {trained.path}", soft_wrap=True, highlight=False)

"""`molora federate`: rounds of clients that keep their records, simulated in one process."""

from __future__ import annotations

from molora.cli.options import Overrides, RecipeFile, Resume, ResumeFrom, say_reach, show_run


def command(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, resume_from: ResumeFrom = None
) -> None:
    """Train in federated rounds of simulated clients, evaluate and write a run folder.

    Example: molora federate recipes/federated.yaml federated.aggregate=flora
    """
    from molora.config import load_recipe
    from molora.config.reach import reach

    config = load_recipe(recipe, overrides or [])
    say_reach(reach(config))

    from molora.federated.simulate import federate

    show_run(federate(config, resume=resume_from or resume or None).path)

"""What a search of 12 trials finds on the quickstart: the shipped recipe's score, at fewer parameters?

    python -m eval.search_quickstart [--trials 12] [--folder runs/quickstart-search]

The space is ranks and rates around the recipe's, or with --default-space what `molora search` makes of the recipe; the recipe
itself is the first trial. Scores are the mean greedy exact match of the four tasks on held-out items, without task ids. A search
that is in the folder already goes on, and one that is finished is only written down. Writes eval/results/search.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.cells import OF_FIRST_BASE
from molora.config import load_recipe
from molora.config.search_space import Range, Space, as_plain, default_space
from molora.disk.atomic import write_json
from molora.training.environment import describe_environment
from molora.training.search import SETTINGS, Search, Tried

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
SPACE: Space = {"adapter.r": [8, 4, 5, 6], "train.lr": Range(4e-3, 1e-2, log=True)}
RESULT = Path(__file__).parent / "results" / "search.json"


def smaller(tried: list[Tried]) -> list[Tried]:
    """The trials with fewer parameters than the recipe and at least its score, the smallest first."""
    shipped = next(one for one in tried if one.number == 0)
    assert shipped.score is not None and shipped.parameters is not None
    found = [
        one
        for one in tried
        if one.score is not None and one.parameters is not None
        and one.score >= shipped.score and one.parameters < shipped.parameters
    ]  # fmt: skip
    return sorted(found, key=lambda one: one.parameters or 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--default-space", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart-search"))
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    config = load_recipe(RECIPE, [OF_FIRST_BASE])
    space = default_space(config) if args.default_space else SPACE
    search = Search(config, space, args.folder, args.trials)
    tried = search.run(resume=(args.folder / SETTINGS).is_file())
    result: dict[str, Any] = {
        "environment": describe_environment(), "cost": search.cost, "space": as_plain(space),
        "as good and smaller": [one.number for one in smaller(tried)],
        "trials": [asdict(one) for one in tried],
    }  # fmt: skip
    write_json(args.result, result)
    for one in tried:
        print(one.number, one.state, one.score, one.parameters)


if __name__ == "__main__":
    main()

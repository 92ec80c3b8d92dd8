"""Do weights found on held-out records beat equal weights on other records? For the experts of staged runs.

    for seed in 0 1 2; do
      molora train recipes/stages.yaml seed=$seed output=staged/$seed
      for stage in general domain preferences; do
        molora export staged/$seed/stages --expert $stage --out loras/$seed/$stage
      done
    done
    python -m eval.fusion_search loras --out eval/results/fusion_search.json

Each seed trains experts of its own, draws the records that are chosen on, and seeds the search. What is compared is the mean loss
per target token, averaged over the tasks of recipes/stages_gate.yaml, on records that took no part in the choice.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import molora
from molora.config import RunConfig, load_recipe
from molora.data.tasks import TaskSet
from molora.fusion.search import held_out, mean_loss, summed
from molora.fusion.searchers import SEARCHES
from molora.fusion.sources import read_sources
from molora.models.base import load_base
from molora.models.build import tasks_of

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
STAGES = ("general", "domain", "preferences")


def part(tasks: TaskSet, begin: int, end: int) -> TaskSet:
    """The tasks with a part of their held-out records."""
    return TaskSet(tuple(replace(task, eval=task.eval[begin:end]) for task in tasks), tasks.known_ids)


def compare(config: RunConfig, loras: Path, trials: int, records: int) -> list[dict[str, Any]]:
    """A row for each search and seed: the weights, and the loss on other records of them and of equal ones."""
    base, tokenizer = load_base(config.base)
    tasks = tasks_of(config)
    half = min(len(task.eval) for task in tasks) // 2
    chosen_on, others = part(tasks, 0, half), part(tasks, half, 2 * half)
    batches = held_out(others, tokenizer, half, config.data.max_length, config.eval.batch_size, 0)
    rows = []
    for search in SEARCHES:
        for seed in SEEDS:
            folders = {name: loras / str(seed) / name for name in STAGES}
            found = molora.find_weights(
                base, tokenizer, folders, chosen_on, search=search, step=0.25, trials=trials, records=records,
                seed=seed, max_length=config.data.max_length, batch_size=config.eval.batch_size,
            )  # fmt: skip
            with summed(base, read_sources(folders)) as weigh:
                losses = {}
                for name, weights in (("found", found.best.weights), ("equal", found.equal.weights)):
                    weigh(weights)
                    losses[name] = mean_loss(base, batches)
            rows.append({"search": search, "seed": seed, "weights": found.weights, **losses})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loras", type=Path, help="the folder with <seed>/<stage>, an exported LoRA of each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--records", type=int, default=32)
    given = parser.parse_args()
    config = load_recipe(ROOT / "recipes" / "stages_gate.yaml")
    rows = compare(config, given.loras, given.trials, given.records)
    wins = {s: sum(r["found"] < r["equal"] for r in rows if r["search"] == s) for s in SEARCHES}
    facts = {
        "trials": given.trials,
        "records": given.records,
        "seeds": len(SEEDS),
        "experts": "of a run for each seed",
        "wins": wins,
        "rows": rows,
    }
    given.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

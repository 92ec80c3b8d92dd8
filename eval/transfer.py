"""What a new task with few examples gains from the experts that are there: four ways to start.

    python -m eval.transfer run --data FOLDER [--examples 16 64 256] [--seeds 0]
    python -m eval.transfer page

The base is a MiniLM encoder that classifies by the nearest label text; four tasks of the O-LoRA benchmark have been learned, an
expert each (rank 8 on query and value). A new task comes with so many training examples and trains for 60 steps of 16:

new       an expert that starts from nothing, alone
nearest   an expert that starts as a copy of the one whose task the router finds the new prompts most like, alone
with old  an expert that starts from nothing, weighed with the frozen old ones by a learned table of tasks (`gate: task_table`)
joint     one LoRA of rank 8, trained from nothing on the four tasks and the new one together, for the steps of both

Scores are accuracies over 400 held-out records (300 of imdb), ids given. What old tasks compute is unchanged but under `joint`.
Cells are in eval/results/transfer, the page is eval/results/transfer.md. FOLDER: see `eval.continual`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.cells import Found, make_cell, write_page
from eval.continual import minilm, write_task
from molora.cli.presets import markdown
from molora.continual.grow import add_expert
from molora.store.runs import Run
from molora.training.train import train

CELLS = Path(__file__).parent / "results" / "transfer"
OLD = ("yelp", "sst2", "agnews", "dbpedia")
NEW = ("amazon", "imdb", "yahoo")
WAYS = ("new", "nearest", "with old", "joint")
OLD_STEPS, STEPS, TEST = 160, 60, 400
TRAIN = {"batch_size": 16, "lr": 2.0e-3, "warmup": 0.06}


def recipe(
    work: Path, tasks: dict[str, Any], gate: Any, steps: int, seed: int, experts: int
) -> dict[str, Any]:
    """Several tasks at once, an expert each or one for all."""
    names = [*tasks] if experts > 1 else ["shared"]
    return {
        "name": "transfer", "output": str(work), "seed": seed,
        "base": {"model": minilm(), "task_type": "SEQ_CLS", "head": "match"},
        "adapter": {
            "num_experts": len(names), "expert_names": names, "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"],
            "gate": gate, "router": "gaussian",
            "tasks": {task: [task] if gate == "task" and experts > 1 else names for task in tasks},
        },
        "data": {"max_length": 64, "mixing": "equal", "tasks": tasks},
        "train": {**TRAIN, "max_steps": steps},
        "eval": {"batch_size": 100, "modes": ["task"]},
    }  # fmt: skip


def score(run: Run, task: str) -> float:
    """A task's accuracy with ids given."""
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    return next(s["value"] for s in report["scores"] if s["task"] == task and s["mode"] == "task")


class Old:
    """The runs of the four tasks, made where a cell first asks for them."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work, self.runs = data, work, dict[tuple[str, int], Run]()
        self.tasks = {
            task: write_task(data, task, work, options=False, train=1000, test=TEST) for task in OLD
        }

    def run(self, gate: str, seed: int) -> Run:
        """Under this gate."""
        if (gate, seed) not in self.runs:
            self.runs[gate, seed] = train(recipe(self.work, self.tasks, gate, OLD_STEPS, seed, len(OLD)))
        return self.runs[gate, seed]

    def new(self, task: str, examples: int) -> dict[str, Any]:
        """The new task's entry; its files are of its number of examples."""
        folder = self.work / f"{task}-{examples}"
        folder.mkdir(exist_ok=True)
        return write_task(self.data, task, folder, options=False, train=examples, test=TEST)


def learned(old: Old, task: str, examples: int, way: str, seed: int) -> float:
    """The new task's score after one way of learning it."""
    entry = old.new(task, examples)
    if way == "joint":
        tasks = {**old.tasks, task: entry}
        return score(train(recipe(old.work, tasks, "task", OLD_STEPS + STEPS, seed, 1)), task)
    grow = {
        "task": {"name": task, **entry},
        "expert": {"init": "nearest" if way == "nearest" else "new"},
        "train": {**TRAIN, "max_steps": STEPS},
    }
    parent = old.run("task_table" if way == "with old" else "task", seed)
    return score(add_expert(parent, grow), task)


def run(args: argparse.Namespace) -> None:
    """All cells; those that are there already are kept."""
    CELLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        old = Old(args.data, Path(folder))
        for seed in args.seeds:
            for way in args.ways:
                for task in args.tasks:
                    for examples in args.examples:
                        name = f"{task}_{examples}_{way.replace(' ', '-')}_{seed}"
                        if not (CELLS / f"{name}.json").exists():
                            what = {"task": task, "examples": examples, "way": way, "seed": seed}
                            found = make_cell(
                                CELLS, name, lambda what=what: {**what, "score": learned(old, **what)}
                            )
                            print(found, flush=True)


def page(cells: Sequence[Found]) -> str:
    """The table: tasks and numbers of examples by ways."""
    head = ("new task", "examples", *WAYS)
    keys = sorted(
        {(cell["task"], cell["examples"]) for cell in cells}, key=lambda key: (NEW.index(key[0]), key[1])
    )
    rows = [
        (task, str(examples), *(_cell(cells, task, examples, way) for way in WAYS)) for task, examples in keys
    ]
    return f"# Transfer\n\n{(__doc__ or '').strip()}\n\n{markdown(head, *rows)}\n"


def _cell(cells: Sequence[Found], task: str, examples: int, way: str) -> str:
    same = [c["score"] for c in cells if (c["task"], c["examples"], c["way"]) == (task, examples, way)]
    return f"{100 * statistics.fmean(same):.1f}" if same else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("--data", type=Path, required=True, help="the folder with cl15/ and tasks.json")
    running.add_argument("--examples", type=int, nargs="+", default=[16, 64, 256])
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    running.add_argument("--tasks", nargs="+", choices=NEW, default=list(NEW))
    verbs.add_parser("page")
    args = parser.parse_args()
    if args.verb == "run":
        run(args)
    else:
        write_page(CELLS, page)


if __name__ == "__main__":
    main()

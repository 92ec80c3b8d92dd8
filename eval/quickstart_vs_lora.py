"""Compares a top-2 mixture on the quickstart's tasks with one plain PEFT LoRA of equal parameter count, over several seeds.

    python -m eval.quickstart_vs_lora --result eval/results/quickstart_vs_lora.json

The mixture is that of recipes/quickstart.yaml under a gate that knows no tasks, not even in training. Both arms see the
same batches in the same order, for the same steps, with the same optimiser, schedule and clipping; the LoRA is tried at
several learning rates. Scores are greedy exact match on held-out items at a quarter, half and all of the steps; no task
ids are given to either arm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from eval.cells import OF_FIRST_BASE
from molora.config import RunConfig, load_recipe
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.disk.atomic import write_json
from molora.evaluation.runner import inference
from molora.evaluation.score import Limits, score_task
from molora.models.base import load_base
from molora.models.build import build_model
from molora.training.environment import describe_environment, prepare_process
from molora.training.optimizer import build_optimizer, build_scheduler

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
TOP_2 = [
    OF_FIRST_BASE, "adapter.gate={kind: top_k, top_k: 2}", "adapter.aux_losses={balance: 0.01}", "adapter.router=null",
]  # fmt: skip


def trainable(model: torch.nn.Module) -> int:
    """How many parameters train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_arm(arm: str, config: RunConfig, tasks: TaskSet, parameters: int) -> Any:
    """The model of an arm, "mixture" or "lora", and its tokenizer; the LoRA has about `parameters` parameters."""
    if arm == "mixture":
        return build_model(config, tasks.ids, None)
    base, tokenizer = load_base(config.base)
    rank = round(parameters / lora_parameters_per_rank(config))
    scaling = config.adapter.lora_alpha / config.adapter.r
    lora = LoraConfig(
        r=rank, lora_alpha=scaling * rank, target_modules=config.adapter.target_modules, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora), tokenizer


def lora_parameters_per_rank(config: RunConfig) -> int:
    """Trainable parameters of a plain LoRA of rank 1 on the recipe's targets."""
    base, _ = load_base(config.base)
    lora = LoraConfig(r=1, target_modules=config.adapter.target_modules, task_type="CAUSAL_LM")
    return trainable(get_peft_model(base, lora))


def endless(loader: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches epoch after epoch."""
    while True:
        yield from loader


def exact_match(
    model: Any, tokenizer: PreTrainedTokenizerBase, tasks: TaskSet, config: RunConfig
) -> dict[str, float]:
    """Greedy exact match on the held-out items of every task."""
    with inference(model):
        return {task.name: score_task(model, tokenizer, task, Limits.of(config))[0] for task in tasks}


def run_arm(arm: str, config: RunConfig, parameters: int) -> dict[str, Any]:
    """Train and score one arm with one seed and one learning rate."""
    prepare_process(config.seed)
    tasks = TaskSet.from_config(config.data, task_type=config.base.task_type)
    model, tokenizer = build_arm(arm, config, tasks, parameters)
    data = MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed)
    steps = config.train.max_steps
    if steps is None:
        raise SystemExit("the recipe must give train.max_steps")
    optimizer = build_optimizer(model, config.train, fused=True)
    scheduler = build_scheduler(optimizer, config.train, steps)
    weights = [p for p in model.parameters() if p.requires_grad]
    scores, cpu, scored_at = {}, 0.0, {steps // 4, steps // 2, steps}
    model.train()
    start = time.process_time()
    for step, batch in enumerate(endless(data.train_dataloader()), start=1):
        if arm == "lora":
            batch.pop("routing_task_ids")
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.train.clip or float("inf"))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step in scored_at:
            cpu += time.process_time() - start
            scores[str(step)] = exact_match(model, tokenizer, tasks, config)
            start = time.process_time()
        if step == steps:
            break
    row = {"arm": arm, "seed": config.seed, "lr": config.train.lr, "parameters": trainable(model)}
    return {**row, "train_cpu_s": round(cpu, 1), "exact_match": scores}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and smallest exact match over tasks and seeds, per arm, learning rate and step."""
    summary = []
    for arm, lr in dict.fromkeys((row["arm"], row["lr"]) for row in rows):
        chosen = [row for row in rows if (row["arm"], row["lr"]) == (arm, lr)]
        for step in chosen[0]["exact_match"]:
            values = [value for row in chosen for value in row["exact_match"][step].values()]
            mean, worst = round(statistics.fmean(values), 4), min(values)
            summary.append({"arm": arm, "lr": lr, "step": int(step), "mean": mean, "worst": worst})
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=Path("eval/results/quickstart_vs_lora.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lora-lrs", type=float, nargs="+", default=[2e-3, 5e-3])
    parser.add_argument("overrides", nargs="*", help="recipe overrides, section.key=value")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        config = load_recipe(RECIPE, [*TOP_2, *args.overrides, f"seed={seed}"])
        rows.append(run_arm("mixture", config, 0))
        parameters = rows[-1]["parameters"]
        for lr in args.lora_lrs:
            tried = load_recipe(RECIPE, [*TOP_2, *args.overrides, f"seed={seed}", f"train.lr={lr}"])
            rows.append(run_arm("lora", tried, parameters))
        print(json.dumps(rows[-1 - len(args.lora_lrs) :]), flush=True)
        result = {"environment": describe_environment(), "summary": summarise(rows), "rows": rows}
        write_json(args.result, result)


if __name__ == "__main__":
    main()

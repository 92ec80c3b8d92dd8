"""Every kind of expert as the only change of one recipe on the embedded base: accuracy, numbers, step time, memory, disk.

    python -m eval.kinds [--steps 300] [--seeds 0 1 2] [--lrs 2e-3 5e-3 1e-2] [--kinds lora dora ...]

The recipe is recipes/quickstart.yaml without its router. Each kind is trained at each learning rate with the first seed; the best
rate of that seed, by the mean score of the tasks on held-out items, is trained with the others. Scores are greedy exact match,
without task ids. Step time is the median of forward and backward of one batch, the kinds taking turns in every round; it says
something only on a machine that does nothing else. Saved activations are the bytes that one step keeps for its backward pass,
without Parameters. Disk is the adapter's safetensors. Writes eval/results/kinds.json and kinds.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molora.cli.presets import markdown
from molora.config import RunConfig, load_recipe
from molora.config.choices import KINDS
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.disk.atomic import write_json
from molora.models.build import build_model
from molora.training.environment import describe_environment, prepare_process
from molora.training.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
RESULTS = Path(__file__).parent / "results"
ROUNDS = 31

# What a kind needs beside its name: the settings its paper would give it at about the recipe's rank.
OWN: dict[str, list[str]] = {
    "vera": ["adapter.r=256"],
    "adalora": [
        "adapter.aux_losses={task_label: 1.0, orthonormal: 0.1}",
        "adapter.kind_settings={target_r: 4, deltaT: 10}",
    ],
    "bilora": ["adapter.aux_losses={task_label: 1.0, orthonormal: 0.1}"],
    "sparse": [
        "adapter.r=32",
        "adapter.lora_alpha=64",
        "adapter.kind_settings={keep: 0.25, scores: snip, after: 30}",
    ],
    "relora": ["adapter.kind_settings={links: 4, every: 75, rewarm: 5}"],
    "cola": ["adapter.kind_settings={links: 2, every: 150}"],
}


def config_for(
    kind: str, steps: int, seed: int, lr: float, output: str, overrides: Sequence[str]
) -> RunConfig:
    """The recipe with that kind."""
    own = [f"adapter.kind={kind}", *OWN.get(kind, [])]
    run = [
        f"train.max_steps={steps}",
        f"seed={seed}",
        f"train.lr={lr}",
        f"output={output}",
        "eval.modes=[gate]",
    ]
    return load_recipe(RECIPE, ["adapter.router=null", *own, *run, *overrides])


def trained(kind: str, steps: int, seed: int, lr: float, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and score once; a row of the result."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(config_for(kind, steps, seed, lr, folder, overrides))
        report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
        disk = (run.adapter / "adapter_model.safetensors").stat().st_size
    scores = {score["task"]: score["value"] for score in report["scores"]}
    return {"kind": kind, "seed": seed, "lr": lr, "disk": disk, "scores": scores}


def measured(kinds: Sequence[str], rounds: int, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By kind: numbers that learn, median seconds of a step, and bytes that it saves for its backward pass."""
    models, batches = {}, {}
    for kind in kinds:
        config = config_for(kind, 1, 0, 1e-3, "runs", overrides)
        prepare_process(0)
        tasks = TaskSet.from_config(config.data, task_type=config.base.task_type)
        model, tokenizer = build_model(config, tasks.ids, None)
        data = MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed)
        models[kind], batches[kind] = model.train(), next(iter(data.train_dataloader()))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, model in models.items():
            start = time.perf_counter()
            model(**batches[kind]).loss.backward()
            times[kind].append(time.perf_counter() - start)
            model.zero_grad()
    return {
        kind: {
            "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step_s": statistics.median(times[kind][1:]),
            "saved": saved_bytes(model, batches[kind]),
        }
        for kind, model in models.items()
    }


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of everything that autograd keeps for one step, Parameters aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors too: a freed one's address may be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in kept.values())


def mean(row: dict[str, Any]) -> float:
    """Of the tasks' scores."""
    return statistics.fmean(row["scores"].values())


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows, base = [], result["measured"].get("lora")
    for kind, found in result["measured"].items():
        best = [row for row in result["rows"] if row["kind"] == kind and row["lr"] == result["best_lr"][kind]]
        step = found["step_s"] / base["step_s"] if base else float("nan")
        scores = [mean(row) for row in best]
        rows.append(
            (
                f"`{kind}`", f"{statistics.fmean(scores):.1%}", f"{min(scores):.1%}", f"{result['best_lr'][kind]:g}",
                f"{found['numbers']:,}", f"{step:.2f}", f"{found['saved'] / 2**20:.1f}", f"{best[0]['disk'] / 2**10:,.0f}",
            )
        )  # fmt: skip
    head = (
        "kind", "exact match, mean of tasks", "worst seed", "lr", "numbers that learn", "step, of `lora`'s",
        "saved activations, MiB", "adapter on disk, KiB",
    )  # fmt: skip
    return markdown(head, *rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "kinds.json")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("overrides", nargs="*", help="recipe overrides, section.key=value")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": describe_environment(), "steps": args.steps}
    result |= {"measured": measured(args.kinds, args.rounds, args.overrides), "best_lr": {}, "rows": []}
    for kind in args.kinds:
        first = [trained(kind, args.steps, args.seeds[0], lr, args.overrides) for lr in args.lrs]
        best = result["best_lr"][kind] = max(first, key=mean)["lr"]
        result["rows"] += first + [
            trained(kind, args.steps, seed, best, args.overrides) for seed in args.seeds[1:]
        ]
        print(kind, best, [round(mean(row), 4) for row in result["rows"] if row["kind"] == kind], flush=True)
        write_json(args.result, result)
    args.result.with_suffix(".md").write_text(f"{__doc__}\n{table(result)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Every kind of expert as the only change of one recipe: accuracy, numbers, step time, memory, disk.

    python -m eval.kinds run quickstart [--steps 150] [--seeds 0] [--lrs 2e-3 5e-3 1e-2]
    python -m eval.kinds run cl15 --data FOLDER [--lrs 5e-4 2e-3]
    python -m eval.kinds measure
    python -m eval.kinds page

Suite `quickstart` is recipes/quickstart.yaml without its router, four synthetic tasks on version 1 of the embedded base; `cl15`
is four tasks of the O-LoRA benchmark learned jointly on MiniLM (FOLDER: see `eval.continual`), classified by the nearest label
text. Each kind is trained at each learning rate with the first seed, and at the best one, by the mean score of the tasks on
held-out items, with the others; scores are without task ids. A cell is made once: what was interrupted goes on. `measure` takes
the median time of forward and backward of one batch on two blocks of width 1,024 with eight experts of rank 8, the kinds taking
turns each round, on a machine that does nothing else, and counts the bytes that a forward of 512 tokens keeps for its backward
pass, without Parameters. Disk is the adapter's safetensors. Cells are in eval/results/kinds, figures in
eval/results/kinds.json, the page in eval/results/kinds.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from eval.bench import common, peers
from eval.bench.memory import saved_bytes
from eval.cells import OF_FIRST_BASE, Found, make_cell, write_page
from eval.continual import minilm, write_task
from molora import GateConfig, MoLoraConfig
from molora.cli.presets import markdown
from molora.config import RunConfig, load_recipe
from molora.config.choices import KINDS
from molora.disk.atomic import write_json
from molora.training.environment import describe_environment
from molora.training.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "kinds"
CL15 = ("sst2", "agnews", "dbpedia", "yahoo")
STEPS = {"quickstart": 150, "cl15": 100}
LRS = {"quickstart": [2e-3, 5e-3, 1e-2], "cl15": [5e-4, 2e-3]}
ROUNDS = 21


def own_settings(kind: str, steps: int) -> list[str]:
    """What a kind needs beside its name: the settings its paper would give it at about the recipe's rank."""
    losses = "adapter.aux_losses={task_label: 1.0, orthonormal: 0.1}"
    return {
        "vera": ["adapter.r=256"],
        "adalora": [losses, "adapter.kind_settings={target_r: 4, deltaT: 10}"],
        "bilora": [losses],
        "sparse": [
            "adapter.r=32", "adapter.lora_alpha=64",
            f"adapter.kind_settings={{keep: 0.25, scores: snip, after: {steps // 10}}}",
        ],
        "relora": [f"adapter.kind_settings={{links: 4, every: {steps // 4}, rewarm: 5}}"],
        "cola": [f"adapter.kind_settings={{links: 2, every: {steps // 2}}}"],
    }.get(kind, [])  # fmt: skip


def config_for(suite: str, kind: str, steps: int, work: Path, data: Path | None) -> RunConfig:
    """The suite's recipe with that kind."""
    own = ["adapter.router=null", f"adapter.kind={kind}", f"train.max_steps={steps}", "eval.modes=[gate]"]
    recipe: Any = RECIPE
    if suite == "quickstart":
        own.append(OF_FIRST_BASE)
    if suite == "cl15":
        if data is None:
            raise SystemExit("the suite cl15 needs --data, the folder with cl15/ and tasks.json")
        recipe = {
            "name": "kinds",
            "base": {"model": minilm(), "task_type": "SEQ_CLS", "head": "match"},
            "adapter": {
                "num_experts": 4, "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"],
                "gate": {"kind": "sequence", "share": "group"}, "aux_losses": {"task_label": 1.0},
            },
            "data": {
                "max_length": 64, "mixing": "equal",
                "tasks": {task: write_task(data, task, work, options=False, train=2000, test=200) for task in CL15},
            },
            "train": {"batch_size": 16, "warmup": 0.06, "max_steps": steps},
            "eval": {"batch_size": 100, "modes": ["gate"]},
        }  # fmt: skip
    return load_recipe(recipe, [*own, f"output={work}", *own_settings(kind, steps)])


def trained(suite: str, kind: str, steps: int, seed: int, lr: float, data: Path | None) -> Found:
    """Train and score once."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(config_for(suite, kind, steps, Path(folder), data), [f"seed={seed}", f"train.lr={lr}"])
        report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
        disk = (run.adapter / "adapter_model.safetensors").stat().st_size
    scores = {score["task"]: score["value"] for score in report["scores"]}
    what = {"suite": suite, "kind": kind, "steps": steps, "seed": seed, "lr": lr}
    return {**what, "scores": scores, "disk": disk}


def cell(suite: str, kind: str, steps: int, seed: int, lr: float, data: Path | None) -> Found:
    """The same, unless it was made before."""
    name = f"{suite}_{kind}_{steps}_{lr:g}_{seed}"
    file = CELLS / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    return make_cell(CELLS, name, lambda: trained(suite, kind, steps, seed, lr, data))


def run(args: argparse.Namespace) -> None:
    """All cells of a suite."""
    suite, steps = args.suite, args.steps or STEPS[args.suite]
    CELLS.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        first = [cell(suite, kind, steps, args.seeds[0], lr, args.data) for lr in args.lrs or LRS[suite]]
        best = max(first, key=mean)["lr"]
        found = [*first, *(cell(suite, kind, steps, seed, best, args.data) for seed in args.seeds[1:])]
        print(suite, kind, best, [round(mean(one), 4) for one in found], flush=True)


def mean(found: Found) -> float:
    """Of the tasks' scores."""
    return statistics.fmean(found["scores"].values())


# -- step time and memory ------------------------------------------------------------------------------


def adapted(kind: str, base: nn.Module) -> nn.Module:
    """The base with eight experts of that kind on every linear, behind sequence gates."""
    config = MoLoraConfig(
        kind=kind, r=8, lora_alpha=16, num_experts=8, target_modules="all-linear", task_type="CAUSAL_LM",
        gate=GateConfig(scope="sequence", share="group", select="dense"),
    )  # fmt: skip
    return get_peft_model(peers.share(base), config).train()


def measure(args: argparse.Namespace) -> None:
    """By kind: numbers that learn, the time of a step over `lora`'s, and bytes that it saves for its backward pass."""
    torch.set_num_threads(1)
    base = peers.frozen_base(peers.Size(2, args.width), torch.float32)
    models = {kind: adapted(kind, base) for kind in args.kinds}
    batch = peers.batch(base, 8, 64)

    def step(model: nn.Module) -> Callable[[], None]:
        def once() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        return once

    times = common.interleaved({kind: step(model) for kind, model in models.items()}, rounds=args.rounds)
    found = {
        kind: {
            "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step": common.ratio(times, kind, "lora"),
            "saved": saved_bytes(model, 512),
        }
        for kind, model in models.items()
    }
    settings = {"layers": 2, "width": args.width, "batch": [8, 64], "experts": 8, "rounds": args.rounds}
    write_json(RESULTS / "kinds.json", {"environment": describe_environment(), **settings, "kinds": found})
    print(cost_table(found))


# -- the page ------------------------------------------------------------------------------------------


def page(cells: Sequence[Found]) -> str:
    """Everything as Markdown."""
    parts = [f"# Kinds of experts\n\n{(__doc__ or '').strip()}\n"]
    for suite in dict.fromkeys(found["suite"] for found in cells):
        parts.append(f"## {suite}\n\n{suite_table([one for one in cells if one['suite'] == suite])}\n")
    figures = RESULTS / "kinds.json"
    if figures.exists():
        measured = json.loads(figures.read_text(encoding="utf-8"))
        parts.append(f"## Cost, width {measured['width']}\n\n{cost_table(measured['kinds'])}\n")
    return "\n".join(parts)


def cost_table(found: Mapping[str, Found]) -> str:
    """What a step costs with each kind."""
    head = ("kind", "step, of `lora`'s", "numbers that learn", "saved activations, MiB")
    rows = [
        (f"`{kind}`", f"{one['step']['median']:.2f}", f"{one['numbers']:,}", f"{one['saved'] / 2**20:.1f}")
        for kind, one in found.items()
    ]
    return markdown(head, *rows)


def suite_table(cells: Sequence[Found]) -> str:
    """One suite: each kind at its best learning rate."""
    head = ("kind", "mean of tasks", "lr", "by task", "seeds", "adapter on disk, KiB")
    return markdown(head, *suite_rows(cells))


def suite_rows(cells: Sequence[Found]) -> Iterator[tuple[str, ...]]:
    """The best kind first."""
    best: dict[str, list[Found]] = {}
    for kind in dict.fromkeys(found["kind"] for found in cells):
        own = [found for found in cells if found["kind"] == kind]
        seed = min(found["seed"] for found in own)
        lr = max((found for found in own if found["seed"] == seed), key=mean)["lr"]
        best[kind] = [found for found in own if found["lr"] == lr]
    for kind, own in sorted(best.items(), key=lambda item: -statistics.fmean(map(mean, item[1]))):
        tasks = {task: statistics.fmean(found["scores"][task] for found in own) for task in own[0]["scores"]}
        yield (
            f"`{kind}`", f"{statistics.fmean(map(mean, own)):.1%}", f"{own[0]['lr']:g}",
            ", ".join(f"{task} {score:.1%}" for task, score in tasks.items()), str(len(own)), f"{own[0]['disk'] / 2**10:,.0f}",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("suite", choices=[*STEPS])
    running.add_argument("--data", type=Path, help="the folder with cl15/ and tasks.json")
    running.add_argument("--steps", type=int)
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--lrs", type=float, nargs="+")
    measuring = verbs.add_parser("measure")
    measuring.add_argument("--rounds", type=int, default=ROUNDS)
    measuring.add_argument("--width", type=int, default=1024)
    for verb in (running, measuring):
        verb.add_argument("--kinds", nargs="+", default=list(KINDS), help="lora first")
    verbs.add_parser("page")
    args = parser.parse_args()
    if args.verb == "page":
        write_page(CELLS, page)
    else:
        {"run": run, "measure": measure}[args.verb](args)


if __name__ == "__main__":
    main()

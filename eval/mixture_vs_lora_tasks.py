"""The tasks of the study of mixtures against one LoRA, written as files that a recipe names."""

from __future__ import annotations

import itertools
import random
import string
from pathlib import Path
from typing import Any

from eval.continual import write_rows, write_superni, write_task
from eval.continual_grid import ORDERS

EMBEDDED = ("pig", "mirror", "zigzag", "back", "mask", "spell", "shout", "pairs", "even", "boxed")
CL15 = ORDERS["order4"].split()
SUPERNI = (
    "task1687_sentiment140_classification",
    "task875_emotion_classification",
    "task591_sciq_answer_generation",
    "task363_sst2_polarity_classification",
)
LETTERS = string.ascii_lowercase
LENGTH = 6  # letters of a word
PLACES = random.Random(0).sample([*itertools.product(range(LENGTH), repeat=2)], LENGTH**2)


def conflicting_tasks(work: Path, tasks: int, told: bool) -> dict[str, Any]:
    """Tasks on the same words, each of which wants two letters of its own: those at `PLACES[task]`.

    `told`: the prompt begins with the task. The held-out words, the same for all tasks, are never trained on.
    """
    rng = random.Random(0)
    words = ["".join(rng.sample(LETTERS, LENGTH)) for _ in range(640)]
    found = {}
    for task, (first, second) in enumerate(PLACES[:tasks]):
        prefix = f"{LETTERS[task % 26]}{task // 26}:" if told else ""
        rows = {
            split: [{"prompt": f"{prefix}{w}=", "target": w[first] + w[second]} for w in chosen]
            for split, chosen in {"test": words[:40], "train": words[40:]}.items()
        }
        found[f"letters{task}"] = write_rows(work, f"letters{task}", rows)
    return found


def embedded_tasks(work: Path, data: Path | None, told: bool) -> dict[str, Any]:
    """The ten synthetic tasks of the continual quickstart; their prompts begin with the task's name."""
    sizes = {"train_size": 2000, "eval_size": 40}
    return {name: {"source": "synthetic", "generator": name, **sizes} for name in EMBEDDED}


def cl15_tasks(work: Path, data: Path | None, told: bool) -> dict[str, Any]:
    """The 15 tasks of the O-LoRA benchmark: 500 training and 50 test rows each."""
    assert data is not None
    return {task: write_task(data, task, work, options=False, train=500, test=50) for task in CL15}


def superni_tasks(work: Path, data: Path | None, told: bool) -> dict[str, Any]:
    """Four tasks of SuperNI, their instructions in the prompt: 480 training and 40 test rows each."""
    assert data is not None
    return {task.split("_")[0]: write_superni(data, task, work, train=480) for task in SUPERNI}

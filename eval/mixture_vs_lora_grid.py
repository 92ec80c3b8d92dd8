"""The grid of the study of mixtures against one LoRA: suites, arms, and which cells are still missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.mixture_vs_lora_tasks import cl15_tasks, conflicting_tasks, embedded_tasks, superni_tasks

FACTORS = (1, 3, 10)
SEEDS = (0, 1, 2)
Tasks = Callable[[Path, Path | None, bool], dict[str, Any]]
"""(work folder, folder of the real tasks, whether the prompt names the task) -> a recipe's tasks."""


@dataclass(frozen=True)
class Suite:
    """Tasks on a base, and the sizes all arms share. `lr` is multiplied by each of `factors`."""

    title: str
    tasks: Tasks
    base: str
    experts: int
    r: int
    targets: str | tuple[str, ...]
    steps: int
    batch: int
    max_length: int
    new_tokens: int
    arms: tuple[str, ...]
    by_id: bool = False  # the learned gates read the task's id, which the prompt does not tell
    lr: float = 1.0e-3
    factors: tuple[int, ...] = FACTORS
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Cell:
    """One run: an arm in a suite, at a multiple of the suite's learning rate, with a seed."""

    suite: str
    arm: str
    factor: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.suite}_{self.arm.replace(', ', '_').replace(' ', '_')}_x{self.factor}_{self.seed}"


LORAS = ("lora", "rslora", "lora told")
ARMS: dict[str, str] = {
    "lora": "one LoRA of as many parameters (gate included), scaling 2",
    "rslora": "the same LoRA, rank-stabilised scaling 16 / sqrt(rank)",
    "lora told": "the same LoRA, and the prompt says which task it is",
    "top-2": "the best two experts, weights summing to 1, balance loss 0.01",
    "top-2, gate allowed for": "the same with lora_alpha times the number of experts",
    "soft": "all experts, softmax weights",
    "soft, gate allowed for": "the same with lora_alpha times the number of experts",
    "task": "an expert per task, chosen by its id",
    "router-gated": "the same experts; a task router, which read the training prompts, names the task of each prompt",
    "hydralora": "one A, several B, dense (HydraLoRA), rank raised to as many parameters",
    "cores": "one A, one B and a core for each expert, soft (CoMoL), rank raised to as many parameters",
}
FITTED = ("hydralora", "cores")  # whose rank is raised


SCALED = ("lora", "top-2", "top-2, gate allowed for", "soft, gate allowed for", "task", *FITTED)


def _conflict(tasks: int, steps: int, factors: tuple[int, ...], arms: tuple[str, ...]) -> Suite:
    return Suite(
        f"{tasks} conflicting tasks on the same inputs, the id not in the prompt",
        lambda work, data, told: conflicting_tasks(work, tasks, told),
        "molora/tiny", tasks, 1, ("q_proj", "v_proj"), steps, 16, 16, 2, arms,
        by_id=True, lr=3.0e-3, factors=factors,
    )  # fmt: skip


FEW = ("lora", "lora told", "top-2", "soft", "task")
SUITES: dict[str, Suite] = {
    "conflict8": _conflict(8, 150, (*FACTORS, 30), tuple(arm for arm in ARMS if arm != "router-gated")),
    "conflict16": _conflict(16, 300, FACTORS, FEW),
    "conflict32": _conflict(32, 300, FACTORS, FEW),
    "embedded": Suite(
        "the ten tasks of the embedded base, named in the prompt", embedded_tasks,
        "molora/tiny", 10, 4, "all-linear", 80, 16, 64, 24, (*SCALED, "router-gated"), lr=2.0e-3,
    ),
    "minilm": Suite(
        "the 15 tasks of cl15 on MiniLM, jointly", cl15_tasks,
        "minilm", 15, 2, ("query", "value"), 100, 16, 48, 1, (*SCALED, "router-gated"), factors=(1, 3),
    ),
    "smollm2": Suite(
        "four SuperNI tasks on SmolLM2-135M-Instruct", superni_tasks,
        "smollm2", 4, 8, "all-linear", 60, 8, 96, 10, ("lora", "top-2", "top-2, gate allowed for", "task"),
        factors=(1,), seeds=(0,),
    ),
}  # fmt: skip


def adapter(arm: str, suite: Suite) -> dict[str, Any]:
    """The recipe's `adapter` section of a mixture arm; those of FITTED have the rank still to be fitted."""
    own: dict[str, Any] = {"num_experts": suite.experts, "r": suite.r, "lora_alpha": 2 * suite.r}
    own["target_modules"] = suite.targets if isinstance(suite.targets, str) else list(suite.targets)
    if arm.endswith("gate allowed for"):
        own["lora_alpha"] *= suite.experts
    gate: dict[str, Any] = {"share": "group"}
    if arm == "hydralora":
        own |= {"share_A": True}
    if arm == "cores":
        own |= {"kind": "core"}
    if arm == "router-gated":
        own |= {"router": "gaussian"}
    if arm in ("task", "router-gated"):
        return {**own, "gate": {"kind": "task", **gate}}
    if arm.startswith("top-2"):
        chosen = {"select": "top_k", "top_k": 2}
        kind = {"kind": "task_table", **chosen} if suite.by_id else {"kind": "top_k", "top_k": 2}
        return {**own, "gate": {**kind, **gate}, "aux_losses": {"balance": 0.01}}
    return {**own, "gate": {"kind": "task_table" if suite.by_id else "soft", **gate}}


def best_factor(cells: Sequence[dict[str, Any]], suite: str, arm: str) -> int | None:
    """The multiple of the learning rate that was best with the first seed; None while one is missing."""
    settings = SUITES[suite]
    found = {
        cell["factor"]: statistics.fmean(cell["scores"].values())
        for cell in cells
        if (cell["suite"], cell["arm"], cell["seed"]) == (suite, arm, settings.seeds[0])
    }
    if any(factor not in found for factor in settings.factors):
        return None
    return max(settings.factors, key=lambda factor: found[factor])


def missing(cells: Sequence[dict[str, Any]], suites: Sequence[str]) -> Iterator[Cell]:
    """Cells to run next: every rate with the first seed, then the best rate of each arm with the others."""
    done = {(cell["suite"], cell["arm"], cell["factor"], cell["seed"]) for cell in cells}
    for suite in suites:
        settings = SUITES[suite]
        first, *others = settings.seeds
        planned = [
            Cell(suite, arm, factor, first)
            for factor in sorted(settings.factors, key=lambda factor: abs(factor - 3))
            for arm in settings.arms
        ]
        best = {arm: best_factor(cells, suite, arm) for arm in settings.arms}
        planned += [
            Cell(suite, arm, factor, seed)
            for seed in others
            for arm, factor in best.items()
            if factor is not None
        ]
        yield from (c for c in planned if (c.suite, c.arm, c.factor, c.seed) not in done)

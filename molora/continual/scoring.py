"""Score every task of a sequence after a stage: with task ids, without, and how well ids are inferred."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.continual.answers import BASE, OPEN, Answers
from molora.continual.memory import Memory, shown_route
from molora.continual.strategy import Stage, expert_layers
from molora.continual.subspace import overlap
from molora.data.tasks import Task
from molora.evaluation.runner import inference
from molora.evaluation.score import Limits


def score_base(
    config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> dict[str, float]:
    """Accuracy of the base alone on each task, over the task's own classes."""
    found = {}
    with inference(model):
        for task in tasks:
            answers = Answers(model, tokenizer, task, _limits(config))
            found[task.name] = _share(answers.right([BASE] * len(answers), [task.classes] * len(answers)))
    return found


def score_stage(
    config: RunConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    memory: Memory,
    base: dict[str, float],
) -> dict[str, Any]:
    """One row of the matrices.

    Returns:
        `shown` {task: accuracy with its id given, over its own classes}; `hidden` {seen task: accuracy without, over
        the classes seen, or those of the inferred task; None where nobody can tell}; `inferred` {seen task: share of
        samples whose task the router named}; `unchanged` {seen task: whether logits with its id are bit-equal to
        those after its own stage}; `overlap` between experts, averaged over layers and pairs, and by layer.
    """
    joint = config.continual is not None and config.continual.strategy.kind == "joint"
    row: dict[str, Any] = {"task": stage.task.name, "joint": joint, "shown": {}, "hidden": {}, "inferred": {}}
    seen = {task.name: task for task in stage.seen}
    open_classes = sorted({c for task in stage.seen for c in task.classes})
    routes: dict[str, str | None] = {}
    with inference(model):
        for task in stage.tasks:
            known = task.name in seen
            route = routes[task.name] = shown_route(model, task, known)
            if route is BASE:
                row["shown"][task.name] = base[task.name]
                continue
            answers = Answers(model, tokenizer, task, _limits(config))
            right = answers.right([route] * len(answers), [task.classes] * len(answers))
            row["shown"][task.name] = _share(right)
            if not known:
                continue
            named = memory.infer(model, tokenizer, task, answers.examples)
            row["hidden"][task.name] = _hidden(model, answers, named, seen, open_classes)
            if named is not None:
                row["inferred"][task.name] = _share([name == task.name for name in named])
        known_routes = [route if (route := routes[name]) is not None else OPEN for name in seen]
        row["unchanged"] = memory.unchanged(
            model, tokenizer, list(seen.values()), known_routes, config.data.max_length
        )
    row["overlap"] = overlaps(model)
    return row


def _hidden(
    model: Any, answers: Answers, named: Sequence[str] | None, seen: dict[str, Task], classes: Sequence[int]
) -> float | None:
    """Accuracy without a task id; with a router, under what it takes each sample for."""
    if named is None:
        if model.active_peft_config.gate.scope == "task":
            return None
        return _share(answers.right([OPEN] * len(answers), [classes] * len(answers)))
    open_gate = model.active_peft_config.gate.scope == "constant"
    routes = [OPEN if open_gate else name for name in named]
    return _share(answers.right(routes, [seen[name].classes for name in named]))


def overlaps(model: Any) -> dict[str, Any]:
    """Overlap of the experts' subspaces (row spaces of A): the mean over pairs, by layer and over all layers."""
    by_layer = {}
    for key, _, bank in expert_layers(model):
        factors = [expert.A for expert in bank.experts()]
        pairs = [overlap(a, b) for i, a in enumerate(factors) for b in factors[:i]]
        if pairs:
            by_layer[key] = fmean(pairs)
    return {"mean": fmean(by_layer.values()) if by_layer else None, "layers": by_layer}


def _limits(config: RunConfig) -> Limits:
    settings = config.eval
    return Limits(settings.batch_size, settings.max_new_tokens, settings.num_beams, config.data.max_length)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)

"""Score every task of a sequence after a turn: with task ids, without, and how well ids are inferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.continual.memory import Memory
from molora.continual.strategy import Turn, expert_layers
from molora.continual.subspace import overlap
from molora.data.clusters import inference
from molora.data.prompts import encode
from molora.data.tasks import Task
from molora.evaluation.metrics import overall
from molora.evaluation.modes import in_mode
from molora.evaluation.score import Answer, HeldOut, Limits, inputs_of, score_task
from molora.models.task_router import named_prompts, names_tasks
from molora.progress import phase

BASE = None  # the route of the base without experts
OPEN = ""  # no route in particular: the gate decides
PROBE = 16  # held-out records per task whose logits are compared before and after others are learned


def on_route(model: Any, route: str | None) -> AbstractContextManager[Any]:
    """The context in which a task's experts answer, the gate alone (OPEN), or the base (BASE)."""
    return in_mode(model, route, "base" if route is BASE else "gate" if route == OPEN else "task")


class Answers(HeldOut):
    """A model's answers to one task's held-out records under several routes, each worked out once."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits) -> None:
        super().__init__(model, tokenizer, task, limits)
        self._known: dict[str | None, dict[int, Answer]] = {}

    def score(self, routes: Sequence[str | None], classes: Sequence[Sequence[int]]) -> float:
        """The task's metric where each record is answered on a route of its own.

        routes: of each record, the task whose experts answer, OPEN or BASE. classes: those a classifier may choose from.
        """
        for route in dict.fromkeys(routes):
            known = self._known.setdefault(route, {})
            missing = [i for i, other in enumerate(routes) if other == route and i not in known]
            if missing:
                with on_route(self.model, route):
                    known |= self.ask(missing)
        answered = enumerate(zip(routes, classes, strict=True))
        results = [self.result(i, self._known[route][i], among) for i, (route, among) in answered]
        return overall(self.task.metric, results)


def probe_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, route: str | None, max_length: int
) -> Tensor:
    """Logits of one fixed batch of a task, on the CPU: bit-equality is a promise about a fixed shape."""
    records = list(task.eval)[:PROBE]
    batch = inputs_of([encode(task, r, tokenizer, max_length) for r in records], model, tokenizer)
    with inference(model), on_route(model, route):
        logits: Tensor = model(**batch).logits.float().cpu().contiguous()
    return logits


def score_base(
    config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> dict[str, float]:
    """Accuracy of the base alone on each task, over the task's own classes."""
    total = sum(len(task.eval) for task in tasks)
    with inference(model), on_route(model, BASE), phase("evaluating the base", total, "records"):
        return {task.name: score_task(model, tokenizer, task, Limits.of(config))[0] for task in tasks}


def score_turn(
    config: RunConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    memory: Memory,
    base: Mapping[str, float],
) -> dict[str, Any]:
    """One row of the matrices.

    Returns:
        `shown` {task: accuracy with its id given, over its own classes}; `hidden` {seen task: accuracy without, over
        the classes seen, or those of the inferred task; None where there is no way to}; `inferred` {seen task: share of
        samples whose task the router named}; `unchanged` {seen task: whether logits with its id are bit-equal to
        those after its own turn}; `overlap` between experts, averaged over layers and pairs, and by layer.
    """
    joint = config.continual is not None and config.continual.strategy.spec.at_once
    row: dict[str, Any] = {"task": turn.task.name, "joint": joint}
    row |= {"shown": {}, "hidden": {}, "inferred": {}, "unchanged": {}}
    seen = {task.name: task for task in turn.seen}
    open_classes = sorted({c for task in turn.seen for c in task.classes})
    with inference(model), phase("evaluating", len(turn.tasks), "tasks") as shown:
        for task in turn.tasks:
            shown.now(task.name)
            known = task.name in seen
            route = shown_route(model, task, known)
            if route is BASE:
                row["shown"][task.name] = base[task.name]
                continue
            answers = Answers(model, tokenizer, task, Limits.of(config))
            count = len(answers.examples)
            row["shown"][task.name] = answers.score([route] * count, [task.classes] * count)
            if not known:
                continue
            named = _named(model, tokenizer, task, answers, memory)
            row["hidden"][task.name] = _hidden(answers, named, seen, open_classes)
            if named is not None:
                row["inferred"][task.name] = named.count(task.name) / count
            logits = probe_logits(model, tokenizer, task, route, config.data.max_length)
            row["unchanged"][task.name] = memory.unchanged(task.name, logits)
    row["overlap"] = overlaps(model)
    return row


def shown_route(model: Any, task: Task, known: bool) -> str | None:
    """Who answers for a task whose id is given: its own experts, everybody, or (still unknown) nobody."""
    gate = model.active_peft_config.gate
    if gate.scope == "constant":
        return OPEN
    if known:
        return task.name
    return BASE if gate.scope == "task" else OPEN


def _named(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, answers: Answers, memory: Memory
) -> Sequence[str | None] | None:
    """The task that each held-out record is taken for, None: for none that is known; None without a router."""
    if not names_tasks(model):
        return memory.infer(model, tokenizer, task, answers.examples)
    prompts = [example.prompt for example in answers.examples]
    found = named_prompts(model, tokenizer, prompts, batch_size=answers.limits.batch_size)
    return [row.task for row in found]


def _hidden(
    answers: Answers, named: Sequence[str | None] | None, seen: Mapping[str, Task], classes: Sequence[int]
) -> float | None:
    """Accuracy without a task id; with a router, under what it takes each sample for."""
    scope = answers.model.active_peft_config.gate.scope
    count = len(answers.examples)
    if named is None:
        return None if scope == "task" else answers.score([OPEN] * count, [classes] * count)
    routes = [OPEN] * count if scope == "constant" else named
    return answers.score(routes, [classes if name is None else seen[name].classes for name in named])


def overlaps(model: Any) -> dict[str, Any]:
    """Overlap of the experts' subspaces (row spaces of A): the mean over pairs, by layer and over all layers."""
    by_layer = {}
    for key, _, bank in expert_layers(model):
        factors = [expert.A for expert in bank.experts()]
        pairs = [overlap(a, b) for i, a in enumerate(factors) for b in factors[:i]]
        if pairs:
            by_layer[key] = fmean(pairs)
    return {"mean": fmean(by_layer.values()) if by_layer else None, "layers": by_layer}

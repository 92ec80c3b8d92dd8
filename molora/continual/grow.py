"""add_expert: a new run with one more expert, trained on a new task, every task scored before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config import GrowConfig, RunConfig, load_grow, load_recipe
from molora.continual.registry import build_strategy
from molora.continual.scoring import probe_logits
from molora.continual.strategy import Turn
from molora.continual.turn import passes, play_turn, started, teach_old_tasks
from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.evaluation.report import Score
from molora.models.build import check_router, load_trained, tasks_of
from molora.models.label_match import add_labels
from molora.report.plots import LOSSES, plot_loss
from molora.store.runs import Run
from molora.training.environment import at_work, prepare_process
from molora.training.evaluate import score, write_report
from molora.training.optimise import check_device
from molora.training.resume import find_run
from molora.training.trackers import check_loggers
from molora.training.train import with_labels
from molora.tuner.config import MoLoraConfig

UNCHANGED = "old tasks bit-equal with task ids given"


def add_expert(
    run: str | os.PathLike[str] | Run,
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    resume: bool | str | os.PathLike[str] | None = None,
    allow_other_base: bool = False,
) -> Run:
    """Add one expert for a new task to a trained run, in a new run folder; the old one is not touched.

    One step of a sequence of tasks, under a strategy that needs no memory of earlier ones. Only the new expert and
    its gate row are trained, on the new task's data alone. An adapter without a task router gets one, which learns all
    tasks, so that old prompts keep their experts without an id too. All tasks are scored before and after; the report
    says whether the old tasks' logits are bit-equal where task ids are given.

    Args:
        recipe: what `GrowConfig` describes, as a YAML file or a mapping; settings left out are the run's.
        overrides: `section.key=value` texts applied on top.
        resume: True continues the latest run of this growth, a path the run in that folder.
        allow_other_base: go on where the base is not the one the run was trained on; shapes must still fit.

    Raises:
        ConfigError, DataError, AdapterError: before anything is written.
    """
    parent = run if isinstance(run, Run) else Run.find(run)
    grow = load_grow(recipe, overrides, run=parent.config)
    prepare_process(parent.config.seed)
    with at_work():
        model, tokenizer, _ = load_trained(parent.path, trainable=True, allow_other_base=allow_other_base)
        old: MoLoraConfig = model.active_peft_config
        config = grown_config(parent.config, grow, old, parent.path)
        check_device(config.train)
        check_loggers(config.train)
        check_router(config)
        tasks = tasks_of(config, known_ids=old.task_ids)
        config = with_labels(config, tasks)
        if config.base.head == "match":
            add_labels(model, tokenizer, tasks.label_texts)
        target = find_run(config, resume)
        new = tasks[grow.task.name]
        old_tasks = [task for task in tasks if task is not new]
        known = [task for task in old_tasks if len(task.eval)]
        before = _scores_before(config, model, tokenizer, known, new)
        teach_old_tasks(config, model, tokenizer, old_tasks)
        expert, start = started(config, model, tokenizer, new, grow.expert)

        def probed(model: PeftModel) -> list[Tensor]:
            length = config.data.max_length
            return [probe_logits(model, tokenizer, task, task.name, length) for task in known]

        logits = probed(model)

        def conclude(done: Run, grown: PeftModel) -> None:
            plot_loss(done.path / "metrics.csv", done.path / "loss.png", LOSSES)
            report = score(config, grown, tokenizer, [*known, *([new] if len(new.eval) else [])])
            report.before, report.added = before, [new.name]
            same = all(map(torch.equal, probed(grown), logits))
            report.facts |= {
                "parent": f"{parent.path.parent.name}/{parent.path.name}",
                UNCHANGED: same,
            } | start
            write_report(report, done.path, config)

        model.active_peft_config.aux_losses = dict(grow.aux_losses)
        batches = partial(passes, config, model, tokenizer, new)
        return play_turn(
            config,
            model,
            tokenizer,
            Turn(len(old_tasks), [*old_tasks, new], batches, config.seed),
            build_strategy(grow.strategy),
            conclude,
            known_ids=tasks.known_ids,
            expert=expert,
            softmax=grow.softmax,
            run=target,
        )


def grown_config(config: RunConfig, grow: GrowConfig, adapter: MoLoraConfig, beside: Path) -> RunConfig:
    """The recipe of the grown run: the old one with a task, an expert, and the growth's own training settings.

    Raises ConfigError where the task or the expert exists already, or does not fit the run.
    """
    name, expert = grow.task.name, grow.expert.name or grow.task.name
    experts = adapter.expert_names or []
    for what, new, known in (("task", name, list(config.data.tasks)), ("expert", expert, experts)):
        if new.casefold() in [old.casefold() for old in known]:
            raise ConfigError(
                f"the run has {what} {new!r} already (upper and lower case count as one). Its {what}s: {', '.join(known)}.",
                hint="choose another name, or add to a run that does not have it.",
            )
    if grow.softmax != "own" and config.base.head != "match":
        raise ConfigError("softmax acts only where the run's base has head: match; leave it out.")
    plain = derived(config, expert, beside)
    plain["federated"] = None  # the new expert learns here
    plain["train"] = grow.train.model_dump(mode="json")
    plain["data"]["tasks"][name] = grow.task.as_task().model_dump(mode="json")
    section = plain["adapter"]
    section["expert_names"] = [*experts, expert]
    section["num_experts"] = len(experts) + 1
    section["aux_losses"] = dict(grow.aux_losses)
    router = asdict(adapter.router) if adapter.router is not None else None
    section["router"] = router or (grow.router and grow.router.model_dump(mode="json"))
    if config.continual is not None:
        section["tasks"] = {task: list(experts) for task, experts in adapter.tasks.items()}
    if config.stages is not None:
        section["tasks"] = dict(adapter.tasks)
    if section["tasks"] is not None:
        section["tasks"][name] = [expert] if not adapter.gate.learned else section["expert_names"]
    return load_recipe(plain)


def derived(config: RunConfig, expert: str, beside: Path) -> dict[str, Any]:
    """The recipe, as plain data, of a run that is made of another one and named after an expert.

    It is written beside that run where it lies in its recipe's `output`. A run that was copied from elsewhere does not: then the
    new one goes to `runs` of the working folder.
    """
    plain = config.model_dump(mode="json")
    if Path(config.output).resolve() != beside.parents[1].resolve():  # <output>/<name>/<time>; else a copy
        plain["output"] = "runs"
    plain["name"] = f"{config.name}-{expert}"[:64].rstrip(". ")
    plain["continual"] = plain["stages"] = None  # what is made by hand is a run like any other from here on
    plain["adapter"]["from_loras"] = None  # they are in the adapter by now
    return plain


def _scores_before(
    config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase, known: Sequence[Task], new: Task
) -> list[Score]:
    """Old tasks in every mode; the new one in the modes that need no id of it."""
    scores = score(config, model, tokenizer, known).scores
    needing = ("task", "gate") if model.active_peft_config.gate.scope == "task" else ("task",)
    modes = [mode for mode in config.eval.modes if mode not in needing]
    if modes and len(new.eval):
        scores += score(config, model, tokenizer, [new], modes).scores
    return scores

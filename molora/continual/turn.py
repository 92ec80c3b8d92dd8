"""One task's turn: its expert joins the model, a strategy trains it, and what comes after is left to the caller.

Sequences play one turn after another, `add_expert` a single one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.config.grow import NewExpert
from molora.continual.strategy import Strategy, Turn, hold_sum
from molora.data.prompts import Example, encode
from molora.data.tasks import Task, TaskSet
from molora.evaluation.score import inputs_of
from molora.models.build import ready_to_train
from molora.models.label_match import compete
from molora.store.adapter import save
from molora.store.runs import Run
from molora.training.environment import prepare_process
from molora.training.train import Conclude, fit

PASS_RECORDS = 2000  # of a task's training data that strategies look at before and after training


def play_turn(
    config: RunConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    strategy: Strategy,
    conclude: Conclude,
    *,
    known_ids: Mapping[str, int],
    expert: NewExpert | None = None,
    softmax: str | None = None,
    run: Run | None = None,
) -> Run:
    """Train on one task as a strategy does it.

    Args:
        config: the recipe of this turn alone.
        model: as earlier tasks left it.
        conclude: called with the run and the trained model, in eval mode, once the strategy is done with the task.
        known_ids: ids of all tasks by name.
        expert: the expert that joins; None where the task trains one that is there.
        softmax: whose labels compete in a classifier's loss; None: the strategy says.
        run: the run to go on with, or the folder to begin in; None makes a new one.
    """
    prepare_process(config.seed)  # a new expert starts alike, however much was drawn before
    if expert is not None:
        name = turn.task.name
        model.add_expert(
            expert.name or name, tasks=[name], init=expert.init, freeze_others=True, isolate=expert.isolate
        )
    ready_to_train(model.get_base_model(), config.train)
    hold_sum(model)
    compete(model, turn.competing(softmax or strategy.softmax))
    strategy.before_task(model, turn)

    def after(done: Run, trained: PeftModel) -> None:
        strategy.after_task(trained, turn)
        if strategy.changes_weights:
            save(trained, done.adapter)
        conclude(done, trained)

    tasks = TaskSet(tuple(strategy.training_tasks(turn)), known_ids)
    return fit(config, model, tokenizer, tasks, run, after, strategy)


def passes(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Iterator[dict[str, Tensor]]:
    """A pass over (a part of) a task's training data, with its id where the gate wants one."""
    examples = drawn(config, tokenizer, task, PASS_RECORDS)
    for start in range(0, len(examples), config.train.batch_size):
        part = examples[start : start + config.train.batch_size]
        batch = inputs_of(part, model, tokenizer)
        if model.active_peft_config.gate.scope == "task":
            batch["routing_task_ids"] = torch.full((len(part),), task.id)
        yield batch


def drawn(config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, count: int) -> list[Example]:
    """So many of a task's training records, drawn at random: files are often sorted by label."""
    everything = range(len(task.train))
    chosen = sorted(random.Random(config.seed).sample(everything, min(count, len(everything))))
    return [encode(task, task.train[i], tokenizer, config.data.max_length) for i in chosen]

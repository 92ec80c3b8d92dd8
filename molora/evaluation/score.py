"""One task's held-out records: what the model answers to each, and what comes of every answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from molora.data.collate import collate, pad_token
from molora.data.prompts import Example, encode, render
from molora.data.tasks import Task
from molora.errors import DataError
from molora.evaluation.generate import batches_by_length, generate_answers
from molora.evaluation.metrics import METRICS, Result, match_label, mean, token_nll

Answer = Tensor | str | tuple[float, int]
"""To one record: a classifier's logits (class,), a text, or nats and number of the target's tokens."""


@dataclass(frozen=True)
class Limits:
    """How much is scored at once, how long an answer may get, and the longest input in tokens."""

    batch_size: int = 32
    max_new_tokens: int = 32
    num_beams: int = 1
    max_length: int = 512


def score_task(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits
) -> tuple[float, list[Result]]:
    """The task's metric over its held-out records, and what came of each.

    The model answers as it is set up: call it inside the mode's context, in eval mode, without gradients.

    Raises:
        DataError: the task has no held-out records.
    """
    examples = held_out(task, tokenizer, limits)
    answers = ask(model, tokenizer, task, examples, limits)
    found = [result_of(task, i, example, answers[i]) for i, example in enumerate(examples)]
    return mean(METRICS[task.metric], found), found


def held_out(task: Task, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[Example]:
    """The task's held-out records, encoded; DataError where there are none."""
    if not len(task.eval):
        raise DataError(
            f"task {task.name!r} has no held-out records to score.",
            hint="give it `eval` (files), `eval_split` or `eval_size`.",
        )
    return [encode(task, record, tokenizer, limits.max_length) for record in task.eval]


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    limits: Limits,
    rows: Sequence[int] | None = None,
) -> dict[int, Answer]:
    """The model's answer to each of these rows of the examples; None: to all."""
    rows = range(len(examples)) if rows is None else rows
    if task.task_type == "SEQ_CLS" or task.metric == "loss":
        return dict(_forward(model, tokenizer, task, examples, limits, rows))
    texts = generate_answers(
        model,
        tokenizer,
        [list(examples[i].prompt) for i in rows],
        batch_size=limits.batch_size,
        max_new_tokens=limits.max_new_tokens,
        num_beams=limits.num_beams,
    )
    return dict(zip(rows, texts, strict=True))


def _forward(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    limits: Limits,
    rows: Sequence[int],
) -> Iterator[tuple[int, Answer]]:
    """Answers that a forward pass gives: logits (class,) of a classifier, or the loss on the target."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for part in batches_by_length([len(examples[i].input_ids) for i in rows], limits.batch_size):
        chosen = [rows[i] for i in part]
        batch = inputs_of([examples[i] for i in chosen], model, tokenizer)
        if task.task_type == "SEQ_CLS":
            yield from zip(chosen, model(**batch).logits.float().cpu(), strict=True)
            continue
        labels = batch["labels"] if encoder_decoder else batch.pop("labels")
        nll, tokens = token_nll(model(**batch).logits, labels, shift=not encoder_decoder)
        yield from zip(chosen, zip(nll.tolist(), tokens.tolist(), strict=True), strict=True)


def inputs_of(
    examples: Sequence[Example], model: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Padded input_ids and attention_mask of whole examples on the model's device, and the targets of generative models.

    They say where the prompt ends, which is what gates read in training and when the model answers.
    """
    batch = collate(examples, pad_token(tokenizer))
    keys = ["input_ids", "attention_mask"]
    if batch["labels"].dim() == 2:
        keys.append("labels")
    device = next(model.parameters()).device
    return {key: batch[key].to(device) for key in keys}


def result_of(
    task: Task, record: int, example: Example, answer: Answer, classes: Sequence[int] | None = None
) -> Result:
    """What comes of a record with this answer; `classes`: what a classifier chooses from, default the task's own."""
    if isinstance(answer, Tensor):
        assert isinstance(example.labels, int)
        logits = only_classes(answer, classes or task.classes or range(len(task.labels)))
        nll = float(F.cross_entropy(logits, torch.tensor(example.labels)))
        return Result(record, int(logits.argmax()), example.labels, nll)
    if not isinstance(answer, str):
        return Result(record, nll=answer[0], count=answer[1])
    target = render(task, task.eval[record])[1]
    if task.metric == "accuracy" and task.labels:
        return Result(record, match_label(answer, task.labels), target)
    return Result(record, answer.strip(), target.strip())


def only_classes(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits (class,) in float32 with -inf for every class but these."""
    kept = torch.full_like(logits, float("-inf"), dtype=torch.float32)
    kept[list(classes)] = logits[list(classes)].float()
    return kept

"""One task, one number: held-out records -> batches -> the task's metric."""

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
from molora.evaluation.metrics import TokenLoss, accuracy, exact_match, match_label


@dataclass(frozen=True)
class Limits:
    """How much is scored at once, how long an answer may get, and the longest input in tokens."""

    batch_size: int = 32
    max_new_tokens: int = 32
    num_beams: int = 1
    max_length: int = 512


def score_task(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits
) -> tuple[float, int]:
    """The task's metric over its held-out records, and how many there are.

    The model answers as it is set up: call it inside the mode's context, in eval mode, without gradients.

    Raises:
        DataError: the task has no held-out records.
    """
    if not len(task.eval):
        raise DataError(
            f"task {task.name!r} has no held-out records to score.",
            hint="give it `eval` (files), `eval_split` or `eval_size`.",
        )
    examples = [encode(task, record, tokenizer, limits.max_length) for record in task.eval]
    if task.task_type == "SEQ_CLS":
        value = _classified(model, tokenizer, task, examples, limits)
    elif task.metric == "loss":
        value = _token_loss(model, tokenizer, examples, limits)
    else:
        value = _answered(model, tokenizer, task, examples, limits)
    return value, len(examples)


def _answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], limits: Limits
) -> float:
    """Exact match of generated answers, or accuracy of the label they name."""
    answers = generate_answers(
        model,
        tokenizer,
        [list(example.input_ids[: example.prompt_length]) for example in examples],
        batch_size=limits.batch_size,
        max_new_tokens=limits.max_new_tokens,
        num_beams=limits.num_beams,
    )
    targets = [render(task, record)[1] for record in task.eval]
    if task.metric == "accuracy" and task.labels:
        return accuracy([match_label(answer, task.labels) for answer in answers], targets)
    return exact_match(answers, targets)


def _classified(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], limits: Limits
) -> float:
    """Accuracy or mean loss in nats of a classification head, over the task's own labels."""
    right, loss = 0, 0.0
    for batch in _batches(model, tokenizer, examples, limits):
        labels = batch.pop("labels")
        logits = only_classes(model(**batch).logits, task.classes or range(len(task.labels)))
        right += int((logits.argmax(dim=-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return (loss if task.metric == "loss" else right) / len(examples)


def only_classes(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits (batch, class) in float32 with -inf for every class but these."""
    kept = torch.full_like(logits, float("-inf"), dtype=torch.float32)
    kept[:, list(classes)] = logits[:, list(classes)].float()
    return kept


def _token_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limits: Limits
) -> float:
    """Mean loss in nats per target token."""
    losses = TokenLoss()
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for batch in _batches(model, tokenizer, examples, limits):
        labels = batch["labels"]
        inputs = batch if encoder_decoder else {key: batch[key] for key in ("input_ids", "attention_mask")}
        losses.update(model(**inputs).logits, labels, shift=not encoder_decoder)
    return losses.mean


def _batches(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limits: Limits
) -> Iterator[dict[str, Tensor]]:
    """Padded batches on the model's device, without task ids: the mode's context gives them, or nobody."""
    pad = pad_token(tokenizer)
    for chosen in batches_by_length([len(example.input_ids) for example in examples], limits.batch_size):
        batch = collate([examples[i] for i in chosen], pad)
        batch.pop("routing_task_ids")
        device = next(model.parameters()).device
        yield {key: value.to(device) for key, value in batch.items()}

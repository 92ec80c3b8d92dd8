"""Previews: the first records of a task as the model will see them, with what is masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from molora.data.prompts import IGNORED, encode
from molora.data.records import where_of
from molora.data.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreviewToken:
    """One token as text, and whether the loss reads it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Preview:
    """One record: the text given to the model, the text it learns, and the tokens of both in order."""

    where: str
    prompt: str
    target: str
    tokens: tuple[PreviewToken, ...]
    cut_prompt: int
    cut_target: int


def preview(
    task: Task, tokenizer: PreTrainedTokenizerBase, n: int = 3, *, max_length: int = 512
) -> list[Preview]:
    """The first `n` training records of a task as `encode` gives them. Raises what `encode` raises."""
    return [_preview(task, record, tokenizer, max_length) for record in islice(task.train, n)]


def _preview(
    task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Preview:
    """One record. Its texts are read back from its tokens, so special tokens and cuts show."""

    def text(*ids: int) -> str:
        return str(tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    example = encode(task, record, tokenizer, max_length)
    if isinstance(example.labels, int):
        own = task.classes.index(example.labels) if task.classes else example.labels
        learned, target = [], f"{task.labels[own]} (class {example.labels})"
    else:
        learned = [label for label in example.labels if label != IGNORED]
        target = text(*learned)
    given = [PreviewToken(text(i), False) for i in example.prompt]
    return Preview(
        where=where_of(record),
        prompt=text(*example.prompt),
        target=target,
        tokens=(*given, *(PreviewToken(text(i), True) for i in learned)),
        cut_prompt=example.cut_prompt,
        cut_target=example.cut_target,
    )

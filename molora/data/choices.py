"""The answers a record lets a model choose from, encoded: the labels of its task, or those that the record lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from molora.data.prompts import Example, encode
from molora.data.render import answers_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molora.data.tasks import Task


@dataclass(frozen=True)
class Choices:
    """The answers of one record: as they stand in it, each after the prompt, and the place of the right one."""

    texts: Sequence[str]
    examples: Sequence[Example]
    right: int


def choices_of(
    task: Task, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Choices:
    """All answers to a record, each encoded as training would encode it. Raises DataError as `answers_of`."""
    texts, field, right = answers_of(task, record)
    return Choices(
        texts, [encode(task, {**record, field: text}, tokenizer, max_length) for text in texts], right
    )

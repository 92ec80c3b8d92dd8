"""Training batches: examples to tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molora.data.prompts import IGNORED, Example
from molora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's padding token, else its end-of-sequence token.

    Padding is recognised by position (attention mask 0, label -100), never by its id, so an answer's own
    end-of-sequence token is still learned. Raises ConfigError where the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        f"the tokenizer of {tokenizer.name_or_path!r} has neither a padding nor an end-of-sequence token.",
        hint="set tokenizer.pad_token",
    )


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch of examples of one kind.

    Returns input_ids and attention_mask (batch, seq), labels (batch, seq), (batch, target seq) for a seq2seq
    model or (batch,) for a classification head, and routing_task_ids (batch,), all int64.
    """
    inputs = [example.input_ids for example in examples]
    targets = [example.labels for example in examples if not isinstance(example.labels, int)]
    classes = [example.labels for example in examples if isinstance(example.labels, int)]
    return {
        "input_ids": pad_right(inputs, pad_id),
        "attention_mask": pad_right([[1] * len(row) for row in inputs], 0),
        "labels": torch.tensor(classes) if classes else pad_right(targets, IGNORED),
        "routing_task_ids": torch.tensor([example.task_id for example in examples]),
    }


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor (batch, longest), padded with `value`."""
    out = torch.full((len(rows), max(len(row) for row in rows)), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out

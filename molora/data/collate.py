"""Batches: examples to padded tensors, on the right for training and on the left for generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molora.data.prompts import IGNORED, Example
from molora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's padding token, else its end-of-sequence token.

    Padding is told by position (attention mask 0, label -100), never by its id, so an answer's own
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
    """A training batch, padded on the right.

    Returns input_ids and attention_mask (batch, seq), labels (batch, seq), (batch, target seq) for a seq2seq
    model or (batch,) for a classification head, and routing_task_ids (batch,), all int64.
    """
    batch = pad_right([example.input_ids for example in examples], pad_id)
    if isinstance(examples[0].labels, int):
        labels = torch.tensor([example.labels for example in examples])
    else:
        rows = [example.labels for example in examples if not isinstance(example.labels, int)]
        labels = _padded(rows, IGNORED, left=False)
    return {
        **batch,
        "labels": labels,
        "routing_task_ids": torch.tensor([example.task_id for example in examples]),
    }


def prompt_batch(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (batch, seq) padded on the left, so that every prompt ends where answers begin.

    Raises DataError for a prompt without tokens, which a causal model cannot continue.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise DataError(
            "a prompt has no tokens, so there is nothing to continue.", hint="write text in the prompt"
        )
    return _batch(prompts, pad_id, left=True)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (batch, seq) padded on the right: what encoders and training take."""
    return _batch(rows, pad_id, left=False)


def _batch(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> dict[str, Tensor]:
    mask = _padded([[1] * len(row) for row in rows], 0, left=left)
    return {"input_ids": _padded(rows, pad_id, left=left), "attention_mask": mask}


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    width = max(len(row) for row in rows)
    out = torch.full((len(rows), width), value)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return out

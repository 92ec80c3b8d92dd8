"""Training batches: examples to tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
        "input_ids": padded(inputs, pad_id),
        "attention_mask": padded([[1] * len(row) for row in inputs], 0),
        "labels": torch.tensor(classes) if classes else padded(targets, IGNORED),
        "routing_task_ids": torch.tensor([example.task_id for example in examples]),
    }


def collate_pairs(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch of pairs: the preferred answers' rows, then the rejected ones' in the same order; keys as of `collate`."""
    rejected = [example.rejected for example in examples]
    assert all(rejected), "a task without rejected answers"
    return collate([*examples, *(example for example in rejected if example is not None)], pad_id)


def padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows of different lengths as one tensor (batch, longest), filled up with `value` on one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that the first batch needs the most memory."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded_batches(
    prompts: Sequence[Sequence[int]], pad_id: int, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Prompts by similar length: their indices, token ids and mask, both (batch, seq) and padded on the right."""
    for part in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        ids = padded([prompts[i] for i in part], pad_id).to(device)
        lengths = torch.tensor([len(prompts[i]) for i in part], device=device)
        yield part, ids, torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)

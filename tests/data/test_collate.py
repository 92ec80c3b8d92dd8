"""Batches: right padding that no loss and no attention sees."""

import pytest

from molora.data.collate import collate, pad_token
from molora.data.prompts import Example
from molora.errors import ConfigError


def test_shorter_examples_are_filled_up_on_the_right():
    batch = collate([Example([5, 6, 7], [-100, 6, 7], 1, 4), Example([8], [8], 0, 2)], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["routing_task_ids"].tolist() == [4, 2]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_compact_examples_give_the_same_batch():
    examples = [Example([5, 6, 7], [-100, 6, 7], 1, 4), Example([8], [8], 0, 2)]
    plain, compact = collate(examples, 0), collate([example.compact() for example in examples], 0)
    assert all(plain[key].equal(compact[key]) for key in plain)


def test_seq2seq_targets_have_their_own_width_and_classes_none():
    batch = collate([Example([5, 6, 7], [1], 3, 0), Example([8], [1, 2], 1, 0)], pad_id=0)
    assert batch["input_ids"].shape == (2, 3) and batch["labels"].tolist() == [[1, -100], [1, 2]]
    heads = collate([Example([5, 6], 2, 2, 0), Example([8], 0, 1, 1)], pad_id=0)
    assert heads["labels"].tolist() == [2, 0]


def test_the_end_token_pads_where_there_is_no_padding_token(make_tokenizer):
    assert pad_token(make_tokenizer()) == 2
    assert pad_token(make_tokenizer(pad_token=None)) == 1
    with pytest.raises(ConfigError, match="neither a padding nor an end"):
        pad_token(make_tokenizer(pad_token=None, eos_token=None))


def test_an_end_token_used_as_padding_is_still_learned():
    batch = collate([Example([5, 1], [-100, 1], 1, 0), Example([5, 6, 1], [-100, 6, 1], 1, 0)], pad_id=1)
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, 6, 1]]

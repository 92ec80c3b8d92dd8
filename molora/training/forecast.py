"""What training will read, hold and take, said before it begins; for `molora validate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain, islice

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.data.audit import Lengths
from molora.data.collate import collate, pad_token
from molora.data.module import SplitSummary, cut_warnings, encode_all
from molora.data.prompts import Example
from molora.data.tasks import TaskSet
from molora.models.base import Labels, base_skeleton
from molora.models.base_check import positions_of
from molora.models.build import build_model
from molora.models.memory import estimate, taken_off
from molora.training.environment import at_work
from molora.training.objective import Supervised
from molora.training.timing import MEASURED, time_steps

RECORDS = 1000  # of a split whose lengths are looked at
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

Examples = Mapping[str, Sequence[Example]]


def at_largest(config: RunConfig) -> RunConfig:
    """The recipe with the ranks that its experts have in the end."""
    growth, adapter = config.train.rank_growth, config.adapter
    if growth is None:
        return config
    assert isinstance(adapter.r, int)  # the schema wants it
    return config.model_copy(update={"adapter": replace(adapter, r=max(adapter.r, growth.max))})


def first_encoded(
    config: RunConfig, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, list[SplitSummary]]:
    """The first training records of each task, encoded, and what was cut of either split."""
    examples, summary = {}, []
    for task in tasks:
        for split, records in (("train", task.train), ("eval", task.eval)):
            if len(records):
                first = [*islice(records, RECORDS)]
                kept, counts = encode_all(task, split, first, tokenizer, config.data.max_length)
                summary.append(counts)
                if split == "train":
                    examples[task.name] = kept
    return examples, summary


def length_lines(
    config: RunConfig, model: PeftModel, examples: Examples, summary: Sequence[SplitSummary]
) -> Iterator[str]:
    """How long records are against what is read of them, a line for each task, and what training would warn of."""
    positions = positions_of(model) or getattr(model.config, "max_position_embeddings", None)
    base = "" if positions is None else f", the base has positions for {positions}"
    sample = (
        f" (the first {RECORDS} records of a task)" if max(map(len, examples.values())) >= RECORDS else ""
    )
    length = config.data.max_length
    yield f"in tokens; data.max_length is {length}{base}{sample}"
    for name, found in examples.items():
        lengths = Lengths.of(found)
        yield f"{name}: median {lengths.at(0.5)}, longest {lengths.tokens[-1]}; {lengths.histogram()}"
    for counts in summary:
        yield from cut_warnings(counts, length, config.base.task_type == "SEQ_CLS")


def memory_line(
    config: RunConfig,
    model: PeftModel,
    labels: Labels,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """What training takes with a batch of the longest records; `model` (without weights) is of no use afterwards."""
    by_length = sorted(chain.from_iterable(examples.values()), key=lambda example: len(example.input_ids))
    batch = collate(by_length[-config.train.batch_size :], pad_token(tokenizer))
    if config.features is not None:
        batch["routing_features"] = torch.zeros(len(batch["input_ids"]), config.features.num_clusters)
    try:
        found = estimate(
            model,
            batch,
            lambda mixture, inputs: Supervised(None).loss(mixture, inputs)[0],
            base_dtype=getattr(torch, config.base.dtype),
            autocast=_AUTOCAST.get(config.train.precision),
        )
        if config.base.quantization != "none":
            bare = base_skeleton(config.base, labels)
            off = taken_off(bare, config.base.quantization, getattr(torch, config.base.dtype))
            found = replace(found, weights=found.weights - off)
    except Exception as error:  # noqa: BLE001  (an architecture may look at values, which fake tensors lack)
        return f"cannot be counted for this base: {type(error).__name__}"
    size = " x ".join(map(str, batch["input_ids"].shape))
    less = "at most " if config.train.gradient_checkpointing else ""
    return (
        f"{_bytes(found.total)} for a batch of {size} tokens: weights {_bytes(found.weights)}, gradients and AdamW "
        f"{_bytes(found.learning)}, kept for backward {less}{_bytes(found.kept)}; while it runs, backward needs more"
    )


def time_line(
    config: RunConfig, ids: dict[str, int], labels: Labels, tasks: TaskSet, turns: Sequence[int] = ()
) -> str:
    """How long training takes here, by a few real steps on some tasks.

    Args:
        config: the recipe, or that of the first turn.
        ids: the tasks that the adapter knows.
        labels: of a classifier's head.
        tasks: those that are trained on.
        turns: how many steps each takes, where there are turns.
    """
    with at_work():
        model, tokenizer = build_model(config, ids, labels)
        seconds, steps = time_steps(config, model, tokenizer, tasks)
    steps, where = (
        (sum(turns), f" in {len(turns)} turns, as long as in the first") if len(turns) > 1 else (steps, "")
    )
    whole = timedelta(seconds=round(seconds * steps))
    return f"{seconds:.2f} s a step here, the median of {MEASURED}: {whole} for {steps} steps{where}, evaluation not counted"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

"""MoLoraDataModule: encoded tasks as Lightning loaders, usable without a recipe or a trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L

from molora.config import DataConfig
from molora.config.data import LIKELIHOODS
from molora.data.collate import collate, pad_token
from molora.data.loader import Collate, ResumableLoader, ordered_loader
from molora.data.prompts import Example, encode
from molora.data.render import answers_of
from molora.data.tasks import Task, TaskSet
from molora.errors import DataError
from molora.progress import phase

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CUT_WARNING = 0.01  # warn when at least this share of the records is cut by max_length


@dataclass(frozen=True)
class SplitSummary:
    """The result of encoding one split of one task: numbers of records, and of tokens after cutting."""

    task: str
    task_id: int
    split: str
    records: int
    cut_prompts: int
    cut_targets: int
    unlabelled: int  # records with no target token left to learn; they are skipped
    tokens: int
    longest: int
    lost_prompts: int = 0  # of which max_length leaves no more than one token


class MoLoraDataModule(L.LightningDataModule):
    """Train and validation batches of a set of tasks; every record is encoded once and kept.

    Batches are dicts of input_ids, attention_mask, labels and routing_task_ids, see `collate`.
    """

    def __init__(
        self,
        config: DataConfig,
        tasks: TaskSet,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int = 0,
        *,
        eval_batch_size: int | None = None,
        collate: Callable[..., dict[str, Any]] = collate,
        halves: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.seed = seed
        self.collate = collate
        self.halves = halves
        self.left_out: set[tuple[int, int]] = set()  # batches to learn nothing from, see ResumableLoader
        self._encoded: dict[tuple[str, str], list[Example]] = {}
        self._summary: list[SplitSummary] = []

    def setup(self, stage: str | None = None) -> None:
        """Read and encode every split, once; raises DataError at the first faulty record."""
        if self._encoded:
            return
        summary = []
        for task in self.tasks:
            for split, records in (("train", task.train), ("eval", task.eval)):
                if not len(records):
                    continue
                examples, counts = encode_all(task, split, records, self.tokenizer, self.config.max_length)
                self._encoded[task.name, split] = examples
                summary.append(counts)
                if split == "eval" and (shared := _shared_files(self.config, task.name)):
                    text = "task %r: %s is trained on and held out: its score will be too good."
                    log.warning(text, task.name, ", ".join(shared))
                for line in cut_warnings(counts, self.config.max_length, task.task_type == "SEQ_CLS"):
                    log.warning(line)
        self._summary = summary

    def train_dataloader(self) -> ResumableLoader:
        """A loader at the start of the first epoch; `load_state_dict` moves it to a saved position."""
        self.setup()
        return ResumableLoader(
            [self.examples(task.name, "train") for task in self.tasks],
            self.batch_size,
            self._collate(),
            seed=self.seed,
            mixing=self.config.mixing,
            temperature=self.config.mixing_temperature,
            weights=[task.weight for task in self.tasks],
            workers=self.config.workers,
            left_out=self.left_out,
            halves=self.halves,
        )

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Every evaluation record in order, task by task; an empty list, as Lightning expects, if there are none."""
        self.setup()
        examples = [example for task in self.tasks for example in self.examples(task.name, "eval")]
        if not examples:
            return []
        return ordered_loader(examples, self.eval_batch_size, self._collate(), workers=self.config.workers)

    def examples(self, task: str, split: str) -> list[Example]:
        """The encoded records of one split of one task; empty where it has none."""
        self.setup()
        return self._encoded.get((self.tasks[task].name, split), [])

    def summary(self) -> list[SplitSummary]:
        """What was read, cut and left out, one row per task and split."""
        self.setup()
        return list(self._summary)

    def records_of(self, epoch: int, number: int) -> list[str]:
        """What a training batch is made of: `task 'a' record 7`, counting from 1 those that have something to learn."""
        names = [
            f"task {task.name!r} record {i + 1}"
            for task in self.tasks
            for i in range(len(self.examples(task.name, "train")))
        ]
        return [names[index] for index in self.train_dataloader().batches(epoch)[number]]

    def _collate(self) -> Collate:
        return partial(self.collate, pad_id=pad_token(self.tokenizer))


def encode_all(
    task: Task,
    split: str,
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[Example], SplitSummary]:
    """Every record of a split encoded, without those that have nothing to learn, and the counts.

    Raises DataError at the first faulty record, or when no record is left.
    """
    every, chosen = [], split == "eval" and task.metric in LIKELIHOODS
    with phase(f"reading {task.name}", len(records), "records", minor=True) as shown:
        for i, record in enumerate(records):
            every.append(encode(task, record, tokenizer, max_length).compact())
            if chosen:
                answers_of(task, record)
            if i % 100 == 0:
                shown.reach(i)
    kept = [example for example in every if example.learns]
    counts = SplitSummary(
        task=task.name,
        task_id=task.id,
        split=split,
        records=len(every),
        cut_prompts=sum(example.cut_prompt > 0 for example in every),
        cut_targets=sum(example.cut_target > 0 for example in every),
        unlabelled=len(every) - len(kept),
        tokens=sum(len(example.input_ids) for example in kept),
        longest=max(len(example.input_ids) for example in every),
        lost_prompts=sum(example.cut_prompt > 0 and example.prompt_length <= 1 for example in every),
    )
    if not kept:
        raise DataError(
            f"task {task.name!r}: none of its {len(every)} {split} records has anything to learn:"
            " every target is empty, or max_length leaves no room for it.",
            hint=f"look at the target template, or raise data.max_length (it is {max_length})",
        )
    return kept, counts


def _shared_files(config: DataConfig, name: str) -> list[str]:
    """Files that a task of the recipe names for both splits; none of one that was built in Python."""
    task = config.tasks.get(name)
    if task is None:
        return []
    train, held_out = ([side] if isinstance(side, str) else side for side in (task.train, task.eval))
    return sorted({*train} & {*held_out}) if isinstance(train, list) and isinstance(held_out, list) else []


def cut_warnings(counts: SplitSummary, max_length: int, whole_text: bool) -> Iterator[str]:
    """What people should know of records that were cut or left out; `whole_text`: a classifier's, cut at the end."""
    where = f"task {counts.task!r}, {counts.split}"
    lost = "texts lose their end" if whole_text else "prompts lose their beginning"
    for number, what in ((counts.cut_prompts, lost), (counts.cut_targets, "targets lose their end")):
        if number >= CUT_WARNING * counts.records and number:
            yield f"{where}: {number} {what} ({100 * number / counts.records:.1f} %) at max_length {max_length}"
    if counts.unlabelled:
        share = 100 * counts.unlabelled / counts.records
        yield f"{where}: {counts.unlabelled} records ({share:.1f} %) have nothing to learn and are left out"

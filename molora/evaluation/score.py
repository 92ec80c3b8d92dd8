"""One task's held-out records: what the model answers to each, and what comes of every answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.config.data import LIKELIHOODS
from molora.config.evaluation import SamplingConfig
from molora.data.choices import Choices, choices_of
from molora.data.collate import batches_by_length, collate, pad_token
from molora.data.prompts import IGNORED, Example, encode
from molora.data.render import render
from molora.data.tasks import Task
from molora.errors import DataError
from molora.evaluation.draws import Draws
from molora.evaluation.generate import generate_answers
from molora.evaluation.metrics import Result, match_label, overall, token_nll
from molora.evaluation.pass_at_k import Judge, pass_at_k
from molora.progress import advance

Likelihood = tuple[float, int]
"""Nats and number of the tokens of an answer that was given."""

Drawn = tuple[tuple[str, bool], ...]
"""Answers that were drawn, each with whether it is right."""

Answer = Tensor | str | Likelihood | list[Likelihood] | Drawn
"""To one record: a classifier's logits (class,), a text, the target's likelihood, that of each choice, or several texts."""

AfterBatch = Callable[[Sequence[int]], None] | None
"""Called with the places of records that have just been answered together, in the order of the batch."""


@dataclass(frozen=True)
class Limits:
    """How much is scored at once, how long an answer may get, and the longest input in tokens."""

    batch_size: int = 32
    max_new_tokens: int = 32
    num_beams: int = 1
    max_length: int = 512
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @classmethod
    def of(cls, config: RunConfig) -> Limits:
        """Those of a recipe."""
        found = config.eval
        sampling = found.sampling or SamplingConfig()
        length = config.data.max_length
        return cls(found.batch_size, found.max_new_tokens, found.num_beams, length, config.seed, sampling)


def score_task(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, limits: Limits, after_batch: AfterBatch = None
) -> tuple[float, list[Result]]:
    """The task's metric over its held-out records, and what came of each; see `HeldOut`."""
    held_out = HeldOut(model, tokenizer, task, limits, after_batch)
    answers = held_out.ask(range(len(task.eval)))
    results = [held_out.result(record, answer) for record, answer in sorted(answers.items())]
    return overall(task.metric, results), results


class HeldOut:
    """A task's held-out records, encoded once; DataError where it has none.

    The model answers as it is set up: ask inside the context of a mode, in eval mode, without gradients.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        limits: Limits,
        after_batch: AfterBatch = None,
    ) -> None:
        if not len(task.eval):
            raise DataError(
                f"task {task.name!r} has no held-out records to score.",
                hint="give it `eval` (files), `eval_split` or `eval_size`.",
            )
        self.model, self.tokenizer, self.task, self.limits = model, tokenizer, task, limits
        self.after_batch = after_batch
        self.examples = [encode(task, record, tokenizer, limits.max_length) for record in task.eval]
        self.choices: list[Choices] = []
        self.judge = Judge(task, limits.sampling.timeout) if task.metric == "pass_at_k" else None
        if task.metric in LIKELIHOODS:
            self.choices = [choices_of(task, record, tokenizer, limits.max_length) for record in task.eval]

    def ask(self, records: Sequence[int]) -> dict[int, Answer]:
        """The model's answer to each of these records."""
        if self.task.task_type == "SEQ_CLS":
            return dict(self._classes(records))
        if self.task.metric == "loss":
            return dict(self._targets(records))
        if self.choices:
            return dict(self._choices(records))
        if self.judge is not None:
            return dict(self._drawn(records, self.judge))
        return dict(zip(records, self._texts(records), strict=True))

    def _texts(self, records: Sequence[int], times: int | None = None) -> list[str]:
        """What the model writes to each record; with `times`, so many drawn answers to each, one after another."""
        limits, asked, draws = self.limits, [record for record in records for _ in range(times or 1)], None
        if times is not None:
            keys = [(limits.seed, record, i) for record in records for i in range(times)]
            draws = Draws(limits.sampling.temperature, limits.sampling.top_p, keys)

        def after(places: Sequence[int]) -> None:
            self._answered([asked[i] for i in places])
            advance(sum((i + 1) % (times or 1) == 0 for i in places), "records")

        return generate_answers(
            self.model,
            self.tokenizer,
            [list(self.examples[i].prompt) for i in asked],
            batch_size=limits.batch_size,
            max_new_tokens=limits.max_new_tokens,
            num_beams=1 if draws else limits.num_beams,
            draws=draws,
            after_batch=after,
        )

    def _drawn(self, records: Sequence[int], judge: Judge) -> Iterator[tuple[int, Drawn]]:
        """Several drawn answers to each record, and whether each is right."""
        times = self.limits.sampling.samples
        texts = self._texts(records, times)  # as they are: the space before a line of code means something
        asked = [self.task.eval[record] for record in records for _ in range(times)]
        judged = [*zip(texts, judge.all([*zip(asked, texts, strict=True)]), strict=True)]
        for place, record in enumerate(records):
            yield record, tuple(judged[place * times : (place + 1) * times])

    def _classes(self, records: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """A classifier's logits."""
        lengths = [len(self.examples[i].input_ids) for i in records]
        for part in batches_by_length(lengths, self.limits.batch_size):
            chosen = [records[i] for i in part]
            batch = inputs_of([self.examples[i] for i in chosen], self.model, self.tokenizer)
            yield from zip(chosen, self.model(**batch).logits.float().cpu(), strict=True)
            self._answered(chosen)
            advance(len(chosen), "records")

    def _targets(self, records: Sequence[int]) -> Iterator[tuple[int, Likelihood]]:
        """What the model gives to the target of each record."""
        for place, found in self._likelihoods([self.examples[i] for i in records], records):
            yield records[place], found
            advance(1, "records")

    def _choices(self, records: Sequence[int]) -> Iterator[tuple[int, list[Likelihood]]]:
        """What the model gives to each of the answers that a record lets it choose from."""
        for start in range(0, len(records), self.limits.batch_size):
            chosen = records[start : start + self.limits.batch_size]
            whose = [i for i in chosen for _ in self.choices[i].examples]
            found = dict(self._likelihoods([e for i in chosen for e in self.choices[i].examples], whose))
            in_order = iter(sorted(found.items()))
            for i in chosen:
                yield i, [next(in_order)[1] for _ in self.choices[i].examples]
            advance(len(chosen), "records")

    def _likelihoods(
        self, examples: Sequence[Example], records: Sequence[int]
    ) -> Iterator[tuple[int, Likelihood]]:
        """By place in `examples`, of which each belongs to one of `records`."""
        encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        for part in batches_by_length([len(e.input_ids) for e in examples], self.limits.batch_size):
            batch = inputs_of([examples[i] for i in part], self.model, self.tokenizer)
            labels = batch["labels"] if encoder_decoder else batch.pop("labels")
            nll, tokens = token_nll(self.model(**batch).logits, labels, shift=not encoder_decoder)
            yield from zip(part, zip(nll.tolist(), tokens.tolist(), strict=True), strict=True)
            self._answered([records[i] for i in part])

    def _answered(self, records: Sequence[int]) -> None:
        if self.after_batch is not None:
            self.after_batch(records)

    def result(self, record: int, answer: Answer, classes: Sequence[int] | None = None) -> Result:
        """What comes of an answer; `classes`: those that a classifier chooses from, default the task's own."""
        task = self.task
        if isinstance(answer, Tensor):
            label = torch.tensor(self.examples[record].labels)
            chosen = list(classes or task.classes or range(len(task.labels)))
            logits = torch.full_like(answer, float("-inf"), dtype=torch.float32)
            logits[chosen] = answer[chosen].float()
            return Result(record, int(logits.argmax()), int(label), float(F.cross_entropy(logits, label)))
        if self.judge is not None and isinstance(answer, tuple):
            drawn, target = cast(Drawn, answer), render(task, task.eval[record])[1].strip()
            value = pass_at_k(len(drawn), sum(right for _, right in drawn), self.limits.sampling.k)
            return Result(record, target=target, value=value, drawn=drawn)
        if isinstance(answer, tuple):
            nll, count = cast(Likelihood, answer)
            return Result(record, nll=nll, count=count)
        if isinstance(answer, list):
            texts, right = self.choices[record].texts, self.choices[record].right
            return Result(record, texts[likeliest(answer, task.metric)], texts[right])
        target, before = self._target(record)
        text = answer.strip()
        if task.metric in ("accuracy", "macro_f1") and task.labels:
            said = text.removeprefix(before).strip()
            wanted = target.removeprefix(before).strip()
            return Result(record, match_label(said, task.labels), wanted, text=said)
        return Result(record, text, target)

    def _target(self, record: int) -> tuple[str, str]:
        """The text that a right answer is, and what of it the chat template writes before the record's own.

        Templates of models that think write an empty thought before an answer, which the model learns with it.
        """
        written, example = render(self.task, self.task.eval[record])[1].strip(), self.examples[record]
        if not self.task.chat_template or isinstance(example.labels, int) or example.cut_target:
            return written, ""
        learned = [label for label in example.labels if label != IGNORED]
        trained = str(self.tokenizer.decode(learned, skip_special_tokens=True)).strip()
        return (
            (trained, trained[: -len(written)].strip())
            if written and trained.endswith(written)
            else (trained, "")
        )


def likeliest(answers: Sequence[Likelihood], metric: str) -> int:
    """The place of the answer with the largest likelihood, or with `likelihood_norm` the largest per token; the first of several.

    Every answer counts with the token that ends it, which the model learned with it: so that `1` is no better a start than
    `10` is. lm-evaluation-harness leaves that token out, and divides by characters.
    """
    nats = [nll / count if metric == "likelihood_norm" else nll for nll, count in answers]
    return nats.index(min(nats))


def inputs_of(
    examples: Sequence[Example], model: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Padded input_ids and attention_mask of whole examples on the model's device, and the targets of generative models.

    They say where the prompt ends, which is what gates read in training and when the model answers.
    """
    batch = collate(examples, pad_token(tokenizer))
    del batch["routing_task_ids"]
    if batch["labels"].dim() == 1:
        del batch["labels"]
    device = next(model.parameters()).device
    return {key: tensor.to(device) for key, tensor in batch.items()}

"""What is odd about a task's records before anything is trained: doubles, leaks into what is held out, labels, lengths.

Texts count as equal when they are after whitespace is folded and upper case is lowered. Up to `MOST` records of a split
are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

from molora.data.prompts import Example
from molora.data.render import label_index, render
from molora.data.tasks import Task

MOST = 100_000
UNEVEN = 10  # times as many records of the most frequent label as of the rarest
BINS = 6  # of a histogram of lengths


@dataclass(frozen=True)
class Audit:
    """Counts over one task. `labels`, `held_out`: records of each label, in the order of the task's labels."""

    task: str
    train: int
    eval: int
    doubles: int = 0  # training records that are there before
    contradictions: int = 0  # prompts with more than one answer among the training records
    empty: int = 0  # training prompts without text
    leaks: int = 0  # held-out records whose prompt is among the training records
    labels: Mapping[str, int] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def majority(self) -> tuple[str, float] | None:
        """See `majority_of`."""
        return majority_of(self.labels, self.held_out)

    def lines(self) -> Iterator[str]:
        """What people should know of it, a sentence each; nothing where all is well."""
        if self.doubles:
            yield f"{self.doubles} of {self.train} training records are there twice"
        if self.contradictions:
            yield f"training prompts with more than one answer: {self.contradictions}"
        if self.empty:
            yield f"{self.empty} of {self.train} training prompts are empty: nothing there tells a gate or a router what is asked"
        if self.leaks:
            share = f"{100 * self.leaks / self.eval:.0f} %"
            yield f"{self.leaks} of {self.eval} held-out prompts ({share}) are trained on: scores will be too good"
        if not self.eval:
            yield "no held-out records, so it will not be scored: `eval: 0.1` holds out a tenth of the training records"
        if self.labels:
            counts = ", ".join(f"{name} {count}" for name, count in islice(self.labels.items(), 20))
            yield f"labels: {counts}" + (", ..." if len(self.labels) > 20 else "")
        missing = [name for name, count in self.labels.items() if not count]
        if missing:
            yield f"no training record has the label {', '.join(missing[:10])}"
        elif self.labels and max(self.labels.values()) >= UNEVEN * min(self.labels.values()):
            yield "labels are uneven: look at accuracy by label, or even them out"
        if self.majority is not None:
            label, right = self.majority
            yield f"always saying {label!r} would be right for {100 * right:.1f} % of what is held out"


def majority_of(labels: Mapping[str, int], held_out: Mapping[str, int]) -> tuple[str, float] | None:
    """The most frequent label of the training records, and the held-out accuracy of always saying it.

    None where nothing is labelled or held out.
    """
    total = sum(held_out.values())
    if not total or not labels:
        return None
    label = max(labels, key=lambda name: labels[name])
    return label, held_out.get(label, 0) / total


def label_counts(task: Task, split: str) -> dict[str, int]:
    """How many records of a classification's split have each of its labels."""
    counts = dict.fromkeys(task.labels, 0)
    for record in islice(task.train if split == "train" else task.eval, MOST):
        counts[task.labels[label_index(task, record)]] += 1
    return counts


def audit(task: Task) -> Audit:
    """Read a task's records and count; raises DataError as `render` at the first faulty record."""
    trained: dict[bytes, set[bytes]] = {}
    doubles = empty = leaks = 0
    classify = task.kind == "classification"
    for record in islice(task.train, MOST):
        prompt, target = render(task, record)
        key, answer = _digest(prompt), _digest(target)
        answers = trained.setdefault(key, set())
        doubles += answer in answers
        empty += not prompt.strip()
        answers.add(answer)
    for record in islice(task.eval, MOST):
        leaks += _digest(render(task, record)[0]) in trained
    return Audit(
        task=task.name,
        train=min(len(task.train), MOST),
        eval=min(len(task.eval), MOST),
        doubles=doubles,
        empty=empty,
        contradictions=sum(len(answers) > 1 for answers in trained.values()),
        leaks=leaks,
        labels=label_counts(task, "train") if classify else {},
        held_out=label_counts(task, "eval") if classify else {},
    )


def _digest(text: str) -> bytes:
    return blake2b(" ".join(text.split()).lower().encode(), digest_size=12).digest()


@dataclass(frozen=True)
class Lengths:
    """Tokens of records before anything is cut, sorted."""

    tokens: Sequence[int]
    cut: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Lengths:
        """Those of encoded records."""
        seq2seq = [isinstance(e.labels, int) or len(e.labels) != len(e.input_ids) for e in examples]
        lengths = [
            len(e.input_ids) + e.cut_prompt + (0 if apart else e.cut_target)
            for e, apart in zip(examples, seq2seq, strict=True)
        ]
        return cls(sorted(lengths), sum(bool(e.cut_prompt or e.cut_target) for e in examples))

    def at(self, share: float) -> int:
        """The length that this share of the records does not exceed."""
        return self.tokens[min(len(self.tokens) - 1, max(0, round(share * len(self.tokens)) - 1))]

    def histogram(self) -> str:
        """`to 16: 20 %, to 32: 55 %, to 64: 100 %`: shares of the records up to powers of two."""
        edges = [2**power for power in range(1, 40) if 2**power >= self.tokens[0]]
        used = edges[: next(i for i, edge in enumerate(edges) if edge >= self.tokens[-1]) + 1][-BINS:]
        total = len(self.tokens)
        return ", ".join(
            f"to {edge}: {100 * sum(n <= edge for n in self.tokens) / total:.0f} %" for edge in used
        )

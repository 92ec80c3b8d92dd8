"""Tasks: named, with stable ids, each a set of records and the way to turn one into text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain
from typing import Any

from molora.config import DataConfig, TaskConfig
from molora.config.data import KIND_OF_TASK_TYPE, LIKELIHOODS, METRICS
from molora.config.names import check_name
from molora.config.suggest import did_you_mean
from molora.data.skipping import without_faulty
from molora.data.sources import LazyRecords, TableRecords, records_of
from molora.data.templates import parse_template, single_field
from molora.errors import ConfigError

log = logging.getLogger(__name__)

MOST_LABELS = 200
_NEEDS = {
    "rouge_l": "rouge_score",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
}  # packages of the extra `metrics`
_TASK_TYPE_OF_KIND = {kind: task_type for task_type, kind in KIND_OF_TASK_TYPE.items()}


@dataclass(frozen=True)
class Task:
    """One task. `train` and `eval` hold records (mappings of fields); `eval` may be empty.

    kind: causal_lm and seq2seq render `prompt` and `target`, or take the conversation in the field `messages`; `rejected` is
    an answer that is worse than the target, and the field `choices` lists the answers of multiple choice; `check` is the
    command that judges an answer of metric pass_at_k;
    classification renders `text`, and `label` names the field with one of `labels` (or its index).
    task_type: the type of the base; on a language model, a classification learns to write the label's name.
    classes: the class of each label in a head shared by all tasks; empty: the label's own index.
    """

    name: str
    id: int
    train: Sequence[Mapping[str, Any]] = field(repr=False)
    eval: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    kind: str = "causal_lm"
    metric: str = ""
    prompt: str = "{prompt}"
    target: str = "{target}"
    rejected: str | None = None
    choices: str | None = None
    check: tuple[str, ...] = ()
    messages: str | None = None
    chat_template: bool = False
    text: str = "{text}"
    label: str = "label"
    labels: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    weight: float = 1.0
    task_type: str = ""

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        if self.kind not in METRICS:
            raise ConfigError(f"{where}: unknown kind {self.kind!r}; allowed: {', '.join(METRICS)}.")
        own_type = _TASK_TYPE_OF_KIND[self.kind]
        for key, value in (
            ("name", check_name(self.name, "task")),
            ("metric", self.metric or METRICS[self.kind][0]),
            ("task_type", self.task_type or own_type),
            # Without a template of its own, a conversation can only be written by the tokenizer's.
            ("chat_template", self.chat_template or self.messages is not None),
        ):
            object.__setattr__(self, key, value)
        allowed = [*KIND_OF_TASK_TYPE] if self.kind == "classification" else [own_type]
        if self.task_type not in allowed:
            raise ConfigError(
                f"{where}: kind {self.kind!r} does not fit a base of task_type {self.task_type}."
            )
        if self.kind == "classification" and len(self.labels) < 2:
            raise ConfigError(f"{where}: a classification needs at least two labels.")
        if find_spec(_NEEDS.get(str(self.metric), "molora")) is None:
            raise ConfigError(
                f"{where}: the metric {self.metric} needs the package {_NEEDS[str(self.metric)]}.",
                hint="pip install 'molora[metrics]'",
            )
        if self.metric == "pass_at_k" and not self.check:
            raise ConfigError(
                f"{where}: the metric pass_at_k needs a check: the command that judges an answer."
            )
        if self.metric in LIKELIHOODS and self.task_type == "SEQ_CLS":
            raise ConfigError(
                f"{where}: the metric {self.metric} needs a language model; a classification head scores its labels itself.",
                hint="use accuracy or macro_f1.",
            )
        for template in self.templates:
            parse_template(template)
        if self.choices is not None:
            single_field(self.target)

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates this task renders."""
        if self.kind == "classification":
            return (self.text,)
        written = () if self.messages is not None else (self.prompt, self.target)
        return written if self.rejected is None else (*written, self.rejected)

    @property
    def fields(self) -> list[str]:
        """The fields of a record that this task reads."""
        found = {name for template in self.templates for _, name in parse_template(template)}
        found |= {self.label} if self.kind == "classification" else {self.messages, self.choices}
        return sorted(name for name in found if name is not None)


def task_from_config(name: str, task_id: int, config: TaskConfig, task_type: str | None = None) -> Task:
    """A task of a recipe. Records are read when first needed, or here where only they name the labels.

    Raises ConfigError for a malformed template or a classification whose labels neither recipe nor data give; DataError
    where the records were needed and cannot be read.
    """
    train, held_out = records_of(config, "train"), records_of(config, "eval")
    if train is None:
        raise ConfigError(f"data.tasks.{name}: names no training records.")
    same = {
        "kind",
        "messages",
        "chat_template",
        "weight",
        "prompt",
        "target",
        "rejected",
        "choices",
        "text",
        "label",
        "metric",
    }
    return Task(
        name=name,
        id=task_id,
        train=train,
        eval=() if held_out is None else held_out,
        check=tuple(config.check or ()),
        labels=_labels(name, config, train) if config.kind == "classification" else (),
        task_type=task_type or "",
        **config.model_dump(include=same, exclude_none=True),
    )


def _labels(name: str, config: TaskConfig, train: LazyRecords) -> tuple[str, ...]:
    """The recipe's labels, those the data declare, or else those that the training records have, sorted."""
    if config.labels is not None:
        return tuple(config.labels)
    column = config.label or "label"
    declared = train.rows.label_names(column) if isinstance(train.rows, TableRecords) else None
    if declared is not None:
        return tuple(declared)
    values = (record.get(column) for record in train)
    plain = {str(value) for value in values if isinstance(value, (str, int)) and not isinstance(value, bool)}
    found = sorted(plain, key=_in_order)
    listed = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
    if not 2 <= len(found) <= MOST_LABELS:
        raise ConfigError(
            f"data.tasks.{name}.labels: is missing, the data do not declare them, and {column!r} holds {len(found)} different "
            f"values: {listed or 'nothing'}.",
            hint=f"name the field with the label (`label: ...`), or write `labels: [...]`; up to {MOST_LABELS} are found alone",
        )
    log.warning("task %r: labels found in the data: %s; a run's config.yaml keeps their order.", name, listed)
    return tuple(found)


def _in_order(label: str) -> tuple[bool, int, str]:
    """Numbers by size, then texts."""
    digits = label.removeprefix("-")
    number = int(label) if digits.isascii() and digits.isdigit() else None
    return number is None, number or 0, label


@dataclass(frozen=True)
class TaskSet:
    """Tasks in recipe order. `known_ids` holds every id ever given, even for tasks that are gone."""

    tasks: tuple[Task, ...]
    known_ids: Mapping[str, int]

    def __post_init__(self) -> None:
        if len({task.task_type for task in self.tasks}) > 1:
            listed = ", ".join(f"{task.name!r} {task.task_type}" for task in self.tasks)
            raise ConfigError(f"the tasks of one set are trained on one kind of base: {listed}.")

    @classmethod
    def from_config(
        cls, config: DataConfig, known_ids: Mapping[str, int] | None = None, task_type: str | None = None
    ) -> TaskSet:
        """The tasks of a recipe. Names in `known_ids` keep their ids, new names get ids never given before.

        Raises ConfigError where names clash, ids are repeated, or a task cannot be set up; see `task_from_config`.
        """
        ids = assign_ids(list(config.tasks), known_ids or {})
        tasks = [task_from_config(name, ids[name], task, task_type) for name, task in config.tasks.items()]
        if config.on_error == "skip":
            tasks = [without_faulty(task, config.tasks[task.name]) for task in tasks]
        return cls(tuple(tasks), ids)

    @classmethod
    def of(cls, *tasks: Task) -> TaskSet:
        """A set of tasks built in Python; ConfigError if two share a name or an id."""
        ids = {task.name: task.id for task in tasks}
        if len(ids) < len(tasks):
            raise ConfigError(f"two tasks have the same name: {', '.join(task.name for task in tasks)}.")
        return cls(tasks, assign_ids(list(ids), ids))

    @property
    def ids(self) -> dict[str, int]:
        """Name -> id of the tasks here."""
        return {task.name: task.id for task in self.tasks}

    @property
    def label_texts(self) -> list[str]:
        """Every label of any task once, see `distinct_labels`."""
        return distinct_labels(task.labels for task in self.tasks)

    def joined(self) -> TaskSet:
        """The same tasks with one head for all labels: a label that two tasks share is one class, regardless of case."""
        place = {label.lower(): i for i, label in enumerate(self.label_texts)}
        for task in self:
            alike = [a for a in task.labels for b in task.labels if a < b and a.lower() == b.lower()]
            if alike:
                raise ConfigError(
                    f"task {task.name!r}: label {alike[0]!r} is there twice, in upper and lower case.",
                    hint="a head that matches the texts of labels reads them in lower case; rename one",
                )
        classes = [tuple(place[label.lower()] for label in task.labels) for task in self]
        tasks = [replace(task, classes=own) for task, own in zip(self, classes, strict=True)]
        return TaskSet(tuple(tasks), self.known_ids)

    def only(self, names: Iterable[str]) -> TaskSet:
        """The tasks of these names."""
        return TaskSet(tuple(self[name] for name in names), self.known_ids)

    @property
    def num_labels(self) -> int:
        """Classes a shared classification head needs: every task counts its own labels from 0."""
        return max((len(task.labels) for task in self.tasks), default=0)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, name: str) -> Task:
        """The task of that name; otherwise a ConfigError that lists the known names."""
        for task in self.tasks:
            if task.name == name:
                return task
        names = list(self.ids)
        raise ConfigError(
            f"unknown task {name!r}.{did_you_mean(name, names)} Known tasks: {', '.join(names)}."
        )


def distinct_labels(of_tasks: Iterable[Iterable[str]]) -> list[str]:
    """Every label once, in order of appearance; labels that differ only in case count as one."""
    found: dict[str, str] = {}
    for label in chain.from_iterable(of_tasks):
        found.setdefault(label.lower(), label)
    return list(found.values())


def assign_ids(names: Sequence[str], known_ids: Mapping[str, int]) -> dict[str, int]:
    """`known_ids` and an id for each new name: one more than any given so far, in the order of `names`."""
    ids = dict(known_ids)
    for name, task_id in known_ids.items():
        if isinstance(task_id, bool) or not isinstance(task_id, int) or task_id < 0:
            raise ConfigError(f"task {name!r}: {task_id!r} is not a task id; ids are whole numbers from 0.")
    if len(set(ids.values())) < len(ids):
        raise ConfigError(f"two tasks have the same id: {ids}.")
    folded = {name.casefold(): name for name in ids}
    following = max(ids.values(), default=-1) + 1
    for name in names:
        name = check_name(name, "task")
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"task {name!r} differs from {other!r} only in upper and lower case.",
                hint="rename one of them",
            )
        if name not in ids:
            ids[name] = following
            following += 1
    return ids

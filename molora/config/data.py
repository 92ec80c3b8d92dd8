"""The `data` section: the tasks, where their records come from and how they are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from molora.config.section import PositiveInt, Problem, Section, TaskName, refuse
from molora.config.suggest import options

# What each source needs, and what it may have beside that.
SOURCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "synthetic": (("generator",), ()),
    **dict.fromkeys(("jsonl", "csv", "parquet"), (("train",), ("eval",))),
    "hub": (("dataset",), ("subset", "revision", "train_split", "eval_split")),
    "folder": (("path",), ("train_split", "eval_split")),
}
SOURCE_KEYS = frozenset(key for needed, optional in SOURCES.values() for key in (*needed, *optional))

# What a task of each kind is scored by, the default first, and the templates only that kind reads.
METRICS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("exact_match", "accuracy", "loss"),
    "seq2seq": ("exact_match", "accuracy", "loss"),
    "classification": ("accuracy", "loss"),
}
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("prompt", "target", "messages", "chat_template"),
    "seq2seq": ("prompt", "target"),
    "classification": ("text", "label", "labels"),
}
KIND_OF_TASK_TYPE = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}

Files = str | list[str]
MOST_GENERATED = 1_000_000


class TaskConfig(Section):
    """One task: a source of records, a way to turn a record into text, and a metric."""

    source: Literal["synthetic", "jsonl", "csv", "parquet", "hub", "folder"]
    kind: Literal["causal_lm", "classification", "seq2seq"] = "causal_lm"
    generator: str | None = None
    train: Files | None = None
    eval: Files | Annotated[float, Field(gt=0, lt=1)] | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    path: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    train_size: PositiveInt | None = None
    eval_size: PositiveInt | None = None
    prompt: str | None = None
    target: str | None = None
    messages: str | None = None
    chat_template: bool = False
    text: str | None = None
    label: str | None = None
    labels: list[str] | None = None
    metric: Literal["exact_match", "accuracy", "loss"] | None = None
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Defaults that depend on the source and the kind, so that a resolved recipe shows them."""
        if not isinstance(data, dict):
            return data
        source, kind = data.get("source"), data.get("kind", "causal_lm")
        defaults: dict[str, Any] = {}
        if isinstance(kind, str) and kind in METRICS:
            defaults["metric"] = METRICS[kind][0]
        if source == "synthetic":
            defaults |= {"train_size": 2000, "eval_size": 200}
        if source in ("hub", "folder"):
            defaults |= {"train_split": "train"}
        if kind == "classification":
            defaults |= {"text": "{text}", "label": "label"}
        elif kind in ("causal_lm", "seq2seq") and data.get("messages") is None:
            defaults |= {"prompt": "{prompt}", "target": "{target}"}
        return {**data, **{key: value for key, value in defaults.items() if data.get(key) is None}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {key for key, value in self if value not in (None, False)}
        refuse([*self._source_problems(given), *self._kind_problems(given)])
        return self

    def _source_problems(self, given: set[str]) -> Iterator[Problem]:
        needed, optional = SOURCES[self.source]
        settings = (*needed, *optional)
        for key in needed:
            if key not in given:
                yield (key,), f"is missing: source {self.source!r} needs it."
        for key in sorted(given & SOURCE_KEYS - {*settings}):
            yield (key,), f"not a setting of source {self.source!r}.{options(key, settings, 'Its settings')}"
        for key in ("train", "eval"):
            if getattr(self, key) == []:
                yield (key,), "is an empty list; name at least one file."
        if isinstance(self.eval, float) and self.eval_size is not None:
            yield ("eval_size",), "eval is a share of the training records; leave the size out."
        for key in ("train_size", "eval_size"):
            if self.source == "synthetic" and (getattr(self, key) or 0) > MOST_GENERATED:
                yield (key,), f"must be at most {MOST_GENERATED:,}: made-up records are kept in memory."

    def _kind_problems(self, given: set[str]) -> Iterator[Problem]:
        own, metrics = KIND_KEYS[self.kind], METRICS[self.kind]
        others = {key for keys in KIND_KEYS.values() for key in keys} - set(own)
        for key in sorted(given & others):
            yield (key,), f"not a setting of kind {self.kind!r}. Its settings: {', '.join(own)}."
        if self.metric not in metrics:
            text = f"{self.metric!r} does not fit kind {self.kind!r}. Allowed: {', '.join(metrics)}."
            yield ("metric",), text
        for key in ("prompt", "target"):
            if self.messages is not None and key in given:
                yield (key,), "is not read when `messages` gives the conversation; write only one of them."
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            yield ("labels",), "names a label twice."
        if self.labels is not None and len(self.labels) < 2:
            yield ("labels",), "needs at least two labels."


class DataConfig(Section):
    """All tasks, and the mix a training batch is drawn from."""

    max_length: PositiveInt = 512
    mixing: Literal["size", "equal", "temperature"] = "size"
    mixing_temperature: Annotated[float, Field(ge=0.05, le=1e6)] = 2.0  # beyond, powers of sizes overflow
    workers: int = Field(default=0, ge=0, le=512)
    on_error: Literal["stop", "skip"] = "stop"
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        first = {name.casefold(): name for name in reversed(self.tasks)}
        alike = {name: first[name.casefold()] for name in self.tasks if first[name.casefold()] != name}
        text = "differs from {!r} only in upper and lower case; rename one."
        refuse((("tasks", name), text.format(other)) for name, other in alike.items())
        return self

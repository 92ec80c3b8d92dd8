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
LIKELIHOODS = ("likelihood", "likelihood_norm")
_WRITTEN = (
    "exact_match", "accuracy", "macro_f1", "token_f1", "rouge_l", "bleu", "chrf", "loss", *LIKELIHOODS, "pass_at_k",
)  # fmt: skip
METRICS: dict[str, tuple[str, ...]] = {
    "causal_lm": _WRITTEN,
    "seq2seq": _WRITTEN,
    "classification": ("accuracy", "macro_f1", "loss", *LIKELIHOODS),
}
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("prompt", "target", "rejected", "choices", "messages", "chat_template"),
    "seq2seq": ("prompt", "target", "rejected", "choices"),
    "classification": ("text", "label", "labels"),
}
KIND_OF_TASK_TYPE = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}

Files = str | list[str]
MOST_GENERATED = 1_000_000


class TaskConfig(Section):
    """One task: a source of records, a way to turn a record into text, and a metric."""

    source: Literal["synthetic", "jsonl", "csv", "parquet", "hub", "folder"]
    """Where records come from: files, a data set of the hub, one saved by `datasets`, or made up."""
    kind: Literal["causal_lm", "classification", "seq2seq"] = "causal_lm"
    """What a record is; follows from `base.task_type`."""
    generator: str | None = None
    """Which synthetic task (source synthetic)."""
    train: Files | None = None
    """File or files, patterns allowed (jsonl, csv, parquet; each may end in .gz)."""
    eval: Files | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Files held out for scoring, or the share of the training records to hold out, as 0.1."""
    dataset: str | None = None
    """A data set's name on the hub."""
    subset: str | None = None
    """One of its configurations."""
    revision: str | None = None
    """A branch, tag or commit of it."""
    path: str | None = None
    """The folder of a saved data set (source folder)."""
    train_split: str | None = None
    """The split to train on (hub, folder)."""
    eval_split: str | None = None
    """The split to score on (hub, folder)."""
    train_size: PositiveInt | None = None
    """Read only the first so many training records; of a synthetic task: make so many."""
    eval_size: PositiveInt | None = None
    """The same of the records to score."""
    prompt: str | None = None
    """What the model is given, a template over a record's fields: `'{question}\\n'`; `{prompt}` where left out."""
    target: str | None = None
    """What it is to answer, the only part in the loss; `{target}` where left out."""
    rejected: str | None = None
    """Of preferences (train.objective: dpo): a worse answer than `target`, which then is `{chosen}` where left out."""
    choices: str | None = None
    """Of multiple choice: the field that lists the answers, of which `target` is the right one."""
    messages: str | None = None
    """The field that holds a conversation, instead of `prompt` and `target`."""
    chat_template: bool = False
    """Put the prompt into the tokenizer's chat template; conversations always are."""
    text: str | None = None
    """Template of a text to classify; `{text}` where left out."""
    label: str | None = None
    """The field with its label; `label` where left out."""
    labels: list[str] | None = None
    """The labels in their order; null: those found in the training records."""
    metric: (
        Literal[
            "exact_match", "accuracy", "macro_f1", "token_f1", "rouge_l", "bleu", "chrf", "loss", "likelihood",
            "likelihood_norm", "pass_at_k",
        ]
        | None
    ) = None  # fmt: skip
    """What the task is scored by; the first that fits its kind, or `likelihood` with `choices`: the share of records whose
    right answer (or label) the model finds the likeliest, with `_norm` by the mean over its tokens. `rouge_l`, `bleu` and
    `chrf` need the extra `metrics`; `pass_at_k` needs a `check`, see `eval.sampling`."""
    check: list[str] | None = Field(default=None, min_length=1)
    """Of `pass_at_k`: the command that judges an answer. It reads one JSON object with `prompt`, `answer` and `record`, and ends
    with 0 where the answer is right. It runs on this machine, with what a model wrote: keep it in a sandbox."""
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """How often its records are drawn beside other tasks'."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Defaults that depend on the source and the kind, so that a resolved recipe shows them."""
        if not isinstance(data, dict):
            return data
        source, kind = data.get("source"), data.get("kind", "causal_lm")
        defaults: dict[str, Any] = {}
        if isinstance(kind, str) and kind in METRICS:
            defaults["metric"] = METRICS[kind][0] if data.get("choices") is None else LIKELIHOODS[0]
        if source == "synthetic":
            defaults |= {"train_size": 2000, "eval_size": 200}
        if source in ("hub", "folder"):
            defaults |= {"train_split": "train"}
        if kind == "classification":
            defaults |= {"text": "{text}", "label": "label"}
        elif kind in ("causal_lm", "seq2seq") and data.get("messages") is None:
            target = "{target}" if data.get("rejected") is None else "{chosen}"
            defaults |= {"prompt": "{prompt}", "target": target}
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
        written = self.kind != "classification"
        if written and self.metric in LIKELIHOODS and self.choices is None:
            text = "is missing: the field that lists the answers, which metric {} chooses from."
            yield ("choices",), text.format(self.metric)
        if self.choices is not None and self.messages is not None:
            yield (
                ("choices",),
                "is not read when `messages` gives the conversation; write a prompt and a target.",
            )
        if (self.metric == "pass_at_k") != (self.check is not None):
            text = (
                "is missing: the command that judges an answer of metric pass_at_k, as in [python, check.py]."
            )
            yield (
                ("check",),
                text if self.check is None else "acts only with metric: pass_at_k; leave it out.",
            )
        if self.check is not None and not self.check[0].strip():
            yield (
                ("check", 0),
                "names no program; write a program and its arguments, as in [python, check.py].",
            )
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
    """Longest text in tokens; longer prompts lose their beginning."""
    mixing: Literal["size", "equal", "temperature"] = "size"
    """How tasks share a batch: by their size, equally, or by size to the power 1 / `mixing_temperature`."""
    mixing_temperature: Annotated[float, Field(ge=0.05, le=1e6)] = 2.0  # beyond, powers of sizes overflow
    """1 is by size; the higher, the more equal."""
    workers: int = Field(default=0, ge=0, le=512)
    """Processes that prepare batches."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a faulty record: stop and name its line, or leave it out and count it."""
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    """The tasks by name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        first = {name.casefold(): name for name in reversed(self.tasks)}
        alike = {name: first[name.casefold()] for name in self.tasks if first[name.casefold()] != name}
        text = "differs from {!r} only in upper and lower case; rename one."
        refuse((("tasks", name), text.format(other)) for name, other in alike.items())
        return self

"""From a record to text: templates, labels and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from molora.config.suggest import did_you_mean
from molora.data.records import where_of
from molora.data.templates import field_of, fill_template, single_field
from molora.errors import DataError


class Written(Protocol):
    """What of a task says how its records are written; see `Task`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def choices(self) -> str | None: ...
    @property
    def messages(self) -> str | None: ...
    @property
    def text(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


def render(task: Written, record: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, target) of a record. Of a conversation: its turns before the answer, one per line, and the answer.

    Raises DataError where a field is missing or has no text, or the label is not one of the task's.
    """
    if task.kind == "classification":
        return fill_template(task.text, record), task.labels[label_index(task, record)]
    if task.messages is not None:
        turns = conversation(task.messages, record)
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:-1]), turns[-1]["content"]
    return fill_template(task.prompt, record), fill_template(task.target, record)


def answers_of(task: Written, record: Mapping[str, Any]) -> tuple[list[str], str, int]:
    """The answers to choose from: each as it stands in the record, the field that takes it, and the place of the right one.

    Raises DataError where the record lists no two answers, lists one twice, or the right one is not among them.
    """
    if task.kind == "classification":
        return [*task.labels], task.label, label_index(task, record)
    field, texts = single_field(task.target), _listed(str(task.choices), record)
    written = [fill_template(task.target, {**record, field: text}) for text in texts]
    wanted = fill_template(task.target, record)
    if wanted not in written:
        raise DataError(
            f"{where_of(record)}: the answer {wanted!r} is not one of those that {task.choices!r} lists.",
            hint=f"it lists: {', '.join(map(repr, texts[:10]))}",
        )
    return texts, field, written.index(wanted)


def _listed(field: str, record: Mapping[str, Any]) -> list[str]:
    texts = field_of(record, field)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where_of(record)}: the field {field!r} must list two texts or more.",
            hint='such as {"question": "...", "choices": ["yes", "no"], "answer": "no"}',
        )
    if len(set(texts)) < len(texts):
        raise DataError(f"{where_of(record)}: the field {field!r} lists an answer twice.")
    return texts


def label_index(task: Written, record: Mapping[str, Any]) -> int:
    """The index of a record's label in `task.labels`; the label is one of those names, or their index."""
    value = field_of(record, task.label)
    if isinstance(value, int) and not isinstance(value, bool) and str(value) in task.labels:
        return task.labels.index(str(value))  # labels that are numbers: stars from 1 to 5
    if isinstance(value, str):
        if value in task.labels:
            return task.labels.index(value)
        if value.isascii() and value.isdigit():  # CSV has no numbers, only text
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return value
    suggestion = did_you_mean(value, task.labels) if isinstance(value, str) else ""
    raise DataError(
        f"{where_of(record)}: {value!r} is not a label of task {task.name!r}.{suggestion}",
        hint=f"its labels: {', '.join(task.labels)} (or 0 to {len(task.labels) - 1})",
    )


def conversation(field: str, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns in a `messages` field, the last one the assistant's, which is the target."""
    turns = field_of(record, field)
    if not isinstance(turns, list) or len(turns) < 2:
        raise DataError(f"{where_of(record)}: the field {field!r} must be a list of at least two messages.")
    turns = [_turn(turn) for turn in turns]
    for number, turn in enumerate(turns, 1):
        parts = [turn.get("role"), turn.get("content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(
                f"{where_of(record)}: message {number} of {field!r} is not a role and a content, both text.",
                hint='a message is {"role": "user", "content": "..."}',
            )
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"{where_of(record)}: the last message of {field!r} is of role {turns[-1]['role']!r}.",
            hint="the last message is what the model learns to say, so its role is assistant",
        )
    return turns


def _turn(turn: Any) -> Any:
    """A turn as ShareGPT writes it (`from`, `value`), as others do."""
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
        return {"role": role, "content": turn.get("value")}
    return turn

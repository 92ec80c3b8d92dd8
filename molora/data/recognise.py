"""What own files hold: which task, which split, and how a record becomes text; for `molora init`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from molora.config import TaskConfig
from molora.config.names import check_name
from molora.data.records import READERS
from molora.data.sources import records_of
from molora.errors import DataError

SOURCES = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_SPLIT = re.compile(r"(?:(?P<task>.+?)[._-])?(?P<split>train|training|eval|test|valid|validation|dev)")
_ANSWERS = ("response", "completion", "answer", "output", "target", "chosen")
_LOOKED_AT = 20  # records: an optional field may be absent from the first ones


@dataclass(frozen=True)
class Layout:
    """A known way to write a record: its name, and the settings of a task that read it."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """One task among the files: its source, its files and how its records are written."""

    task: str
    source: str
    train: Path
    eval: Path | None
    layout: Layout


def recognise(place: Path) -> list[Found]:
    """The tasks of a folder (or of one file): `<task>.jsonl`, or `<task>_train.jsonl` with `<task>_eval.jsonl`.

    Also .csv, .parquet, and the first two gzipped; eval may be called test, valid, validation or dev.

    Raises:
        DataError: no such place, no file of a known kind, or records that are written in no known way.
    """
    if not place.exists():
        raise DataError(f"{place}: there is no such folder or file.")
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    splits: dict[str, dict[str, Path]] = {}
    for file in files:
        if _source(file) is None:
            continue
        task, split = _split(file, place)
        if split in splits.setdefault(task, {}):
            raise DataError(
                f"{splits[task][split]} and {file} are both the {split} records of task {task!r}.",
                hint="keep one of them in the folder; a recipe can name several files: `train: [a.jsonl, b.jsonl]`",
            )
        splits[task][split] = file
    if not splits:
        kinds = ", ".join(SOURCES)
        raise DataError(
            f"{place}: holds no data file.", hint=f"a task is a file ending in {kinds}; .gz may follow"
        )
    return [_found(task, files) for task, files in splits.items()]


def layout_of(records: Sequence[Mapping[str, Any]], where: str) -> Layout:
    """How records are written, by the fields they have.

    Raises:
        DataError: none of the known ways, with what there is.
    """
    fields = list(dict.fromkeys(name for record in records for name in record))
    for name in ("messages", "conversations"):
        if name in fields:
            return Layout("a conversation", {"messages": name})
    answer = next((name for name in _ANSWERS if name in fields), None)
    if "instruction" in fields and answer is not None:
        both = "{instruction}\n{input}\n" if "input" in fields else "{instruction}\n"
        if "input" in fields and not all(isinstance(record.get("input"), str) for record in records):
            raise DataError(
                f"{where}: some records have no `input`.", hint='give each one; `"input": ""` will do'
            )
        return Layout("instruction and output (Alpaca)", {"prompt": both, "target": f"{{{answer}}}"})
    for question in ("prompt", "question", "input"):
        if question in fields and answer not in (None, question):
            return Layout(
                f"{question} and {answer}", {"prompt": f"{{{question}}}\n", "target": f"{{{answer}}}"}
            )
    text = next((name for name in ("text", "sentence", "content") if name in fields), None)
    label = next((name for name in ("label", "labels", "class", "category") if name in fields), None)
    if text is not None and label is not None:
        return Layout(
            f"{text} and {label}", {"kind": "classification", "text": f"{{{text}}}", "label": label}
        )
    raise DataError(
        f"{where}: the fields {', '.join(fields)} are of no known kind of record.",
        hint="known are prompt and response (or completion, answer), instruction and output, question and answer, messages, "
        "conversations, text and label; for others write `prompt: ...` and `target: ...` into a recipe yourself.",
    )


def _found(task: str, files: Mapping[str, Path]) -> Found:
    train = files.get("train")
    if train is None:
        raise DataError(f"{files['eval']}: held-out records of a task without training records.")
    source = _source(train)
    assert source is not None
    return Found(task, source, train, files.get("eval"), layout_of(_first(train, source), str(train)))


def _source(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    source = SOURCES.get(suffixes[-1]) if suffixes else None
    return None if source == "parquet" and file.suffix == ".gz" else source


def _split(file: Path, place: Path) -> tuple[str, str]:
    """The task and the split that a file's name says; files called only train and test are of the task of their folder."""
    stem = file.name.removesuffix(".gz").rpartition(".")[0]
    matched = _SPLIT.fullmatch(stem)
    if matched is None:
        return check_name(stem, "task"), "train"
    task = matched["task"] or (place if place.is_dir() else place.parent).absolute().name
    return check_name(task, "task"), "train" if matched["split"].startswith("train") else "eval"


def _first(file: Path, source: str) -> list[Mapping[str, Any]]:
    if source != "parquet":
        found: list[Mapping[str, Any]] = [*islice(READERS[source](file), _LOOKED_AT)]
    else:
        found = [*islice(_parquet(file), _LOOKED_AT)]
    if not found:
        raise DataError(f"{file}: has no records.")
    return found


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    found = records_of(TaskConfig(source="parquet", train=str(file)), "train")
    assert found is not None
    yield from found

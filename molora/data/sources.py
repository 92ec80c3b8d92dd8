"""Where a task's records come from: one function per `source`, read when first needed."""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from array import array
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from molora.config import TaskConfig
from molora.data.records import READERS, OnError, Record, stop
from molora.data.synthetic import generate
from molora.disk.hub import only_cached_if_offline
from molora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "eval"]
T = TypeVar("T")


class Rows(Sequence[Record]):
    """A sequence that knows its length and its single rows."""

    @abstractmethod
    def row(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        found = range(len(self))[index]  # IndexError past the end, as sequences do
        return self.row(found) if isinstance(found, int) else [self.row(i) for i in found]


class LazyRecords(Rows):
    """Records that are read and checked when they are first used."""

    def __init__(self, read: Callable[[], Sequence[Record]]) -> None:
        self._read = read
        self._rows: Sequence[Record] | None = None

    @property
    def rows(self) -> Sequence[Record]:
        """The records themselves; raises DataError where the source is faulty or empty."""
        if self._rows is None:
            self._rows = self._read()
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Record:
        return self.rows[index]


class TableRecords(Rows):
    """Rows of a `datasets.Dataset`, turned into records one at a time: a large table stays on disk."""

    def __init__(self, table: Dataset, name: str, size: int | None = None) -> None:
        self.table = table if size is None or size >= len(table) else table.select(range(size))
        self.name = name

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Record:
        where = f"{self.name} row {index + 1}"
        return Record(_load(where, lambda: self.table[index]), where)

    def label_names(self, column: str) -> list[str] | None:
        """The class names of a column that declares them."""
        names = getattr(self.table.features.get(column), "names", None)
        return list(names) if names else None


class TextRecords(Rows):
    """Records of text files, kept as the JSON they are read from again: a tenth of what their dicts would take."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._rows: list[bytes] = []
        self._lines = array("Q")
        self._files: list[tuple[int, str]] = []  # its first row, and its name
        for i, record in enumerate(records):
            file, _, line = record.where.rpartition(":")
            if not self._files or self._files[-1][1] != file:
                self._files.append((i, file))
            self._lines.append(int(line))
            self._rows.append(json.dumps(record, ensure_ascii=False).encode())

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Record:
        file = self._files[bisect(self._files, index, key=itemgetter(0)) - 1][1]
        return Record(json.loads(self._rows[index]), f"{file}:{self._lines[index]}")


class ChosenRecords(Rows):
    """Some of the records of another sequence, in its order."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self.records, self.indices = records, indices

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> Record:
        return self.records[self.indices[index]]


def records_of(task: TaskConfig, split: Split, on_error: OnError = stop) -> LazyRecords | None:
    """The records of one split of a configured task; None where the recipe gives the task no such split."""
    if isinstance(task.eval, float):
        return LazyRecords(partial(_part, task, split, LazyRecords(partial(_read, task, "train", on_error))))
    named = {"synthetic": _size, "hub": _split_name, "folder": _split_name}.get(task.source, _files)
    # A partial of a module-level function, so that records can be pickled for the loader's workers.
    return LazyRecords(partial(_read, task, split, on_error)) if named(task, split) else None


def _read(task: TaskConfig, split: Split, on_error: OnError) -> Sequence[Record]:
    read = _SOURCES.get(task.source)
    rows = read(task, split) if read else _text(task, split, on_error)
    if not rows:
        files = ", ".join(map(str, _files(task, split)))
        name = files or f"{task.dataset or task.path or task.generator} ({_split_name(task, split)})"
        raise DataError(f"{name}: has no records.", hint="a data set needs at least one record")
    return rows


def _part(task: TaskConfig, split: Split, records: LazyRecords) -> ChosenRecords:
    """The training records that are held out, or the others: the share `eval` of each label, the same ones every time."""
    assert isinstance(task.eval, float)
    groups: dict[str, array[int]] = {}
    for i, record in enumerate(records):
        label = str(record.get(task.label or "label")) if task.kind == "classification" else ""
        groups.setdefault(label, array("Q")).append(i)
    exact = {label: task.eval * len(members) for label, members in sorted(groups.items())}
    counts = {label: int(share) for label, share in exact.items()}
    rest = round(sum(exact.values())) - sum(counts.values())
    for label in sorted(exact, key=lambda label: counts[label] - exact[label])[
        :rest
    ]:  # the largest remainders
        counts[label] += 1
    # Drawn by the label's text: hash() differs between processes.
    held_out = {i for label, n in counts.items() for i in Random(label).sample(groups[label], n)}
    if not 0 < len(held_out) < len(records):
        what = "none to hold out" if not held_out else "all of them"
        raise DataError(
            f"{', '.join(map(str, _files(task, 'train')))}: {task.eval:g} of {len(records)} records is {what}.",
            hint="give another share, or a file of held-out records",
        )
    wanted = split == "eval"
    return ChosenRecords(records, array("Q", (i for i in range(len(records)) if (i in held_out) == wanted)))


def _synthetic(task: TaskConfig, split: Split) -> list[Record]:
    generator, size = task.generator, _size(task, split)
    assert generator is not None and size is not None
    rows = generate(generator, size, split=split)
    return [Record(row, f"{generator} ({split}) row {i + 1}") for i, row in enumerate(rows)]


def _text(task: TaskConfig, split: Split, on_error: OnError) -> TextRecords:
    read = partial(READERS[task.source], on_error=on_error)
    return TextRecords(islice(_each(read, _files(task, split)), _size(task, split)))


def _each(read: Callable[[Path], Iterator[Record]], files: list[Path]) -> Iterator[Record]:
    for file in files:
        empty = True
        for record in read(file):
            empty = False
            yield record
        if empty:
            raise DataError(f"{file}: has no records.", hint="leave the file out, or fill it")


def _parquet(task: TaskConfig, split: Split) -> TableRecords:
    import datasets

    files = _files(task, split)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: there is no such file.")
    name = ", ".join(map(str, files))
    with _without_bars():
        table = _load(name, lambda: datasets.Dataset.from_parquet([str(file) for file in files]))
    return TableRecords(table, name, _size(task, split))


def _hub(task: TaskConfig, split: Split) -> TableRecords:
    import datasets

    wanted = _split_name(task, split)
    name = f"{task.dataset} ({wanted})"
    load = partial(datasets.load_dataset, task.dataset, task.subset, split=wanted, revision=task.revision)
    quiet = nullcontext() if sys.stderr.isatty() else _without_bars()  # a download takes its time
    with quiet, only_cached_if_offline() as offline:
        try:
            table = _load(name, load)
        except DataError as error:
            if offline is None:
                raise
            raise DataError(f"{name}: cannot be read: {offline}.") from error
    return TableRecords(table, name, _size(task, split))


def _folder(task: TaskConfig, split: Split) -> TableRecords:
    """A folder written by `save_to_disk`, or one with data files that `load_dataset` understands."""
    import datasets

    assert task.path is not None
    path, wanted = Path(task.path), _split_name(task, split)
    name = f"{path} ({wanted})"
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder.")
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    with _without_bars():
        loaded = _load(name, partial(datasets.load_from_disk if saved else datasets.load_dataset, str(path)))
    if isinstance(loaded, datasets.DatasetDict):
        if wanted not in loaded:
            listed = ", ".join(map(str, loaded))
            raise DataError(f"{path}: has no split {wanted!r}.", hint=f"its splits: {listed}")
        loaded = loaded[wanted]
    elif wanted != "train":
        raise DataError(
            f"{path}: holds one unnamed data set, so it has no split {wanted!r}.", hint="use train"
        )
    return TableRecords(loaded, name, _size(task, split))


_SOURCES: Mapping[str, Callable[[TaskConfig, Split], Sequence[Record]]] = {
    "synthetic": _synthetic,
    "parquet": _parquet,
    "hub": _hub,
    "folder": _folder,
}


def _size(task: TaskConfig, split: Split) -> int | None:
    return task.train_size if split == "train" else task.eval_size


def _split_name(task: TaskConfig, split: Split) -> str | None:
    return task.train_split if split == "train" else task.eval_split


def _files(task: TaskConfig, split: Split) -> list[Path]:
    given = task.train if split == "train" or isinstance(task.eval, float) else task.eval
    names = [given] if isinstance(given, str) else given or []
    return [Path(name).expanduser() for name in names]


@contextmanager
def _without_bars() -> Iterator[None]:
    """`datasets` draws a bar for every file that it looks at, into pipes too."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _load(name: str, load: Callable[[], T]) -> T:
    """Call into `datasets`; what it raises depends on the format, so every failure is reported with the name."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())
        text = text if len(text) <= 300 else text[:300] + "..."
        raise DataError(f"{name}: cannot be read: {type(cause).__name__}: {text}") from error

"""Where a task's records come from: one function per `source`, read when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from molora.config import TaskConfig
from molora.data.records import READERS, Record
from molora.data.synthetic import generate
from molora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "eval"]
T = TypeVar("T")


class LazyRecords(Sequence[Record]):
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

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return self.rows[index]


class TableRecords(Sequence[Record]):
    """Rows of a `datasets.Dataset`, turned into records one at a time: a large table stays on disk."""

    def __init__(self, table: Dataset, name: str) -> None:
        self.table = table
        self.name = name

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # IndexError past the end, as sequences do
        return Record(self.table[row], f"{self.name} row {row + 1}")

    def label_names(self, column: str) -> list[str] | None:
        """The class names of a column that declares them."""
        names = getattr(self.table.features.get(column), "names", None)
        return list(names) if names else None


def records_of(task: TaskConfig, split: Split) -> LazyRecords | None:
    """The records of one split of a configured task; None where the recipe gives the task no such split."""
    read = _SOURCES[task.source](task, split)
    return None if read is None else LazyRecords(partial(_checked, read, task, split))


def _checked(read: Callable[[], Sequence[Record]], task: TaskConfig, split: Split) -> Sequence[Record]:
    rows = read()
    if not rows:
        raise DataError(
            f"{_describe(task, split)}: has no records.", hint="a data set needs at least one record"
        )
    return rows


def _size(task: TaskConfig, split: Split) -> int | None:
    return task.train_size if split == "train" else task.eval_size


def _describe(task: TaskConfig, split: Split) -> str:
    files = _files(task, split)
    if files:
        return ", ".join(map(str, files))
    return f"{task.dataset or task.path or task.generator} ({_split_name(task, split)})"


# -- sources ----------------------------------------------------------------------------------------------
# Each takes (task, split) and gives a function that reads, or None where the task has no such split.
# They are partials of module-level functions, so that records can be pickled for the loader's workers.

Reader = Callable[[], Sequence[Record]]


def _synthetic(task: TaskConfig, split: Split) -> Reader | None:
    size = _size(task, split)
    if task.generator is None or size is None:
        return None
    return partial(_read_synthetic, task.generator, size, split)


def _read_synthetic(generator: str, size: int, split: Split) -> list[Record]:
    rows = generate(generator, size, split=split)
    return [Record(row, f"{generator} ({split}) row {i + 1}") for i, row in enumerate(rows)]


def _text(task: TaskConfig, split: Split) -> Reader | None:
    files = _files(task, split)
    return partial(_read_text, task.source, files, _size(task, split)) if files else None


def _read_text(kind: str, files: list[Path], size: int | None) -> list[Record]:
    return list(islice(_each(READERS[kind], files), size))


def _each(read: Callable[[Path], Iterator[Record]], files: list[Path]) -> Iterator[Record]:
    for file in files:
        empty = True
        for record in read(file):
            empty = False
            yield record
        if empty:
            raise DataError(f"{file}: has no records.", hint="leave the file out, or fill it")


def _parquet(task: TaskConfig, split: Split) -> Reader | None:
    files = _files(task, split)
    return partial(_read_parquet, files, _size(task, split)) if files else None


def _read_parquet(files: list[Path], size: int | None) -> TableRecords:
    import datasets

    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: there is no such file.")
    name = ", ".join(map(str, files))
    table = _load(name, partial(datasets.Dataset.from_parquet, [str(file) for file in files]))
    return TableRecords(_first(table, size), name)


def _hub(task: TaskConfig, split: Split) -> Reader | None:
    wanted = _split_name(task, split)
    if task.dataset is None or wanted is None:
        return None
    return partial(_read_hub, task.dataset, task.subset, task.revision, wanted, _size(task, split))


def _read_hub(
    dataset: str, subset: str | None, revision: str | None, split: str, size: int | None
) -> TableRecords:
    import datasets

    name = f"{dataset} ({split})"
    load = partial(datasets.load_dataset, dataset, subset, split=split, revision=revision)
    return TableRecords(_first(_load(name, load), size), name)


def _folder(task: TaskConfig, split: Split) -> Reader | None:
    wanted = _split_name(task, split)
    return (
        partial(_read_folder, Path(task.path), wanted, _size(task, split)) if task.path and wanted else None
    )


def _read_folder(path: Path, split: str, size: int | None) -> TableRecords:
    """A folder written by `save_to_disk`, or one with data files that `load_dataset` understands."""
    import datasets

    name = f"{path} ({split})"
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder.")
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    load = partial(datasets.load_from_disk, str(path)) if saved else partial(datasets.load_dataset, str(path))
    loaded = _load(name, load)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{path}: has no split {split!r}.", hint=f"its splits: {', '.join(map(str, loaded))}"
            )
        loaded = loaded[split]
    elif split != "train":
        raise DataError(
            f"{path}: holds one unnamed data set, so it has no split {split!r}.", hint="use train"
        )
    return TableRecords(_first(loaded, size), name)


_SOURCES: Mapping[str, Callable[[TaskConfig, Split], Reader | None]] = {
    "synthetic": _synthetic,
    "jsonl": _text,
    "csv": _text,
    "parquet": _parquet,
    "hub": _hub,
    "folder": _folder,
}


# -- helpers ----------------------------------------------------------------------------------------------


def _files(task: TaskConfig, split: Split) -> list[Path]:
    given = task.train if split == "train" else task.eval
    names = [given] if isinstance(given, str) else given or []
    return [Path(name).expanduser() for name in names]


def _split_name(task: TaskConfig, split: Split) -> str | None:
    return task.train_split if split == "train" else task.eval_split


def _first(table: Dataset, size: int | None) -> Dataset:
    return table if size is None or size >= len(table) else table.select(range(size))


def _load(name: str, load: Callable[[], T]) -> T:
    """Call into `datasets`; what it raises depends on the format, so every failure is reported with the name."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{name}: cannot be read: {type(cause).__name__}: {_one_line(cause)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."

"""Class 18: data files that would hang a reader or fill the memory."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from molora.config import TaskConfig
from molora.data import records
from molora.data.records import read_csv, read_jsonl
from molora.data.sources import records_of
from molora.disk.manifest import read_json, verify_folder, write_manifest
from molora.errors import AdapterError, DataError


@pytest.mark.parametrize("read", [read_jsonl, read_csv])
def test_a_pipe_is_not_waited_for(tmp_path: Path, read) -> None:
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(DataError, match="is a pipe or a device, not a file"):
        list(read(tmp_path / "rows"))
    with pytest.raises(DataError, match="is a pipe or a device, not a file"):
        list(read("/dev/zero"))


def test_a_pipe_in_an_adapter_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    write_manifest(tmp_path)
    (tmp_path / "weights").unlink()
    os.mkfifo(tmp_path / "weights")
    with pytest.raises(AdapterError, match="weights is a pipe or a device"):
        verify_folder(tmp_path)
    with pytest.raises(AdapterError, match="weights is not a file"):
        read_json(tmp_path / "weights")


@pytest.mark.parametrize(("read", "line"), [(read_jsonl, '{{"a": "{}"}}\n'), (read_csv, "{}\n")])
def test_a_gzip_bomb_is_refused_while_it_unpacks(tmp_path: Path, read, line: str) -> None:
    """80 MB of one letter, in 80 KB."""
    file = tmp_path / "bomb.gz"
    with gzip.open(file, "wb") as out:
        for _ in range(80):
            out.write(line.format("x" * 1_000_000).encode())
    with pytest.raises(
        DataError, match=rf"bomb.gz:6\d: {file.stat().st_size:,} bytes of gzip data unpack to more than"
    ):
        list(read(file))


def test_repetitive_data_are_no_bomb(tmp_path: Path) -> None:
    """The limit is judged only from 64 MB on: small files may repeat one row."""
    file = tmp_path / "rows.gz"
    with gzip.open(file, "wb") as out:
        out.write(b'{"prompt": "aaaaaaaaaaaaaaaaaaaa"}\n' * 100_000)
    assert file.stat().st_size < 3_500_000 / records.MAX_PACKED
    assert sum(1 for _ in read_jsonl(file)) == 100_000


def test_a_text_file_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_TEXT", 100)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 20)
    with pytest.raises(
        DataError, match=r"a\.jsonl:7: more than 100 bytes of text.\n  hint: use source: parquet"
    ):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_records_are_kept_small(tmp_path: Path) -> None:
    """As dicts they took 1.6 kB each."""
    rows, file = 3_000, tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"what is {i}?", "target": f"{i}"}) + "\n" for i in range(rows))
    )
    task = TaskConfig(source="jsonl", train=[str(file), str(file)])
    tracemalloc.start()
    found = records_of(task, "train")
    assert found is not None and len(found) == 2 * rows
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200 * 2 * rows
    for index in (0, 5, rows - 1, rows, 2 * rows - 1):
        assert found[index] == {"prompt": f"what is {index % rows}?", "target": f"{index % rows}"}
        assert found[index].where == f"{file}:{index % rows + 1}"

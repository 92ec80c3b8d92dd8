"""`data.on_error: skip`: what cannot be used is left out, counted and told of; `stop`, the default, ends at the first."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from molora.config import DataConfig
from molora.data.render import render
from molora.data.tasks import Task, TaskSet
from molora.errors import DataError

ROWS = [
    '{"prompt": "a", "target": "1"}',
    '{"prompt": "b"',
    '{"prompt": "c"}',
    "",
    '{"prompt": "d", "target": "4"}',
    '["e"]',
    '{"prompt": "f", "target": null}',
    '{"prompt": "g", "target": "7"}',
]


def task_of(on_error: str, **settings: Any) -> Task:
    return TaskSet.from_config(DataConfig.model_validate({"on_error": on_error, "tasks": {"t": settings}}))[
        "t"
    ]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\n".join(ROWS).encode() + b'\n{"prompt": "h\xff", "target": "8"}\n')
    return file


def test_stop_ends_at_the_first_fault(jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*cut off"):
        len(task_of("stop", source="jsonl", train=str(jsonl)).train)


def test_skip_keeps_what_can_be_used(jsonl: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = task_of("skip", source="jsonl", train=str(jsonl), eval=str(jsonl))
    assert not caplog.records  # nothing is read before it is needed
    with caplog.at_level(logging.WARNING):
        assert [record["prompt"] for record in task.train] == ["a", "d", "g"]
    assert [record.where.rpartition(":")[2] for record in task.train] == ["1", "5", "8"]
    (said,) = caplog.messages
    assert said.startswith("task 't', train: 6 of 9 records are faulty and left out (66.7 %). The first: ")
    assert "rows.jsonl:2" in said
    again = pickle.loads(pickle.dumps(task.train))  # noqa: S301  (as a loader's worker gets them)
    assert [record["prompt"] for record in again] == ["a", "d", "g"]
    assert len(task.eval) == 3


def test_labels_and_csv_and_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    (tmp_path / "a.csv").write_text("text,label\nx,yes\ny,no,1\nz,maybe\nw,no\n")
    task = task_of(
        "skip", source="csv", kind="classification", train=str(tmp_path / "a.csv"), labels=["yes", "no"]
    )
    assert [record["text"] for record in task.train] == ["x", "w"]
    datasets.Dataset.from_dict({"prompt": ["a", None, "c"], "target": ["1", "2", "3"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    assert len(task_of("skip", source="parquet", train=str(tmp_path / "a.parquet")).train) == 2
    stopped = task_of("stop", source="parquet", train=str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"row 2"):
        render(stopped, stopped.train[1])


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"promt": "a"}\n' * 3)
    with pytest.raises(DataError, match=r"task 't': none of its 3 train records can be used") as caught:
        len(task_of("skip", source="jsonl", train=str(tmp_path / "a.jsonl")).train)
    assert "prompt" in str(caught.value.__cause__)


def test_a_file_that_cannot_be_read_is_no_faulty_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        len(task_of("skip", source="jsonl", train=str(tmp_path / "none.jsonl")).train)

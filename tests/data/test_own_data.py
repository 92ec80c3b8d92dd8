"""Own data without preparation: held-out records split off, labels found."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from molora.config import DataConfig
from molora.data.render import label_index
from molora.data.tasks import Task, TaskSet
from molora.errors import ConfigError, DataError


def task_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Task:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"source": "jsonl", "train": str(file), **settings}
    return TaskSet.from_config(DataConfig.model_validate({"tasks": {"t": given}}))["t"]


def labelled(**counts: int) -> list[dict[str, Any]]:
    return [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]


def test_a_share_is_split_off_the_same_each_time(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "target": f"t{i}"} for i in range(50)]
    task = task_of(tmp_path, rows, eval=0.2)
    train, held_out = ([record["prompt"] for record in split] for split in (task.train, task.eval))
    assert len(held_out) == 10 and len(train) == 40 and {*train, *held_out} == {row["prompt"] for row in rows}
    assert train == sorted(train, key=lambda text: int(text[1:])), "the order of the file stays"
    settings = {"tasks": {"t": {"source": "jsonl", "train": str(tmp_path / "rows.jsonl"), "eval": 0.2}}}
    code = (
        "import json; from molora.config import DataConfig; from molora.data.tasks import TaskSet; "
        f"task = TaskSet.from_config(DataConfig.model_validate({settings!r}))['t']; "
        "print(json.dumps([record['prompt'] for record in task.eval]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == held_out


def test_every_label_gives_its_share(tmp_path: Path) -> None:
    task = task_of(tmp_path, labelled(a=80, b=20), kind="classification", eval=0.1)
    assert Counter(record["label"] for record in task.eval) == {"a": 8, "b": 2}
    assert Counter(record["label"] for record in task.train) == {"a": 72, "b": 18}


def test_a_share_of_nothing_and_a_size_beside_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0\.1 of 3 records is none to hold out"):
        len(task_of(tmp_path, [{"prompt": "a", "target": "b"}] * 3, eval=0.1).eval)
    with pytest.raises(ValueError, match="eval is a share"):
        task_of(tmp_path, [], eval=0.1, eval_size=5)
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="eval"):
            task_of(tmp_path, [], eval=share)


def test_skipping_and_shares_go_together(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = [json.dumps({"prompt": f"p{i}", "target": "t"}) for i in range(40)]
    file.write_text("\n".join([*good[:20], *["{"] * 10, *good[20:]]) + "\n")
    config = {"on_error": "skip", "tasks": {"t": {"source": "jsonl", "train": str(file), "eval": 0.25}}}
    task = TaskSet.from_config(DataConfig.model_validate(config))["t"]
    assert (len(task.train), len(task.eval)) == (30, 10)


def test_labels_are_found_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert task_of(tmp_path, labelled(no=2, maybe=1, yes=3), kind="classification").labels == (
            "maybe",
            "no",
            "yes",
        )
    assert "task 't': labels found in the data: maybe, no, yes" in caplog.text
    rows = [{"text": "x", "label": number} for number in (10, 2, 1)]
    assert task_of(tmp_path, rows, kind="classification").labels == ("1", "2", "10")


def test_a_field_that_is_no_label_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": f"free text {i}"} for i in range(300)]
    with pytest.raises(ConfigError, match="'label' holds 300 different values"):
        task_of(tmp_path, rows, kind="classification")
    with pytest.raises(ConfigError, match="'lbl' holds 0 different values: nothing"):
        task_of(tmp_path, rows, kind="classification", label="lbl")


def test_many_small_labels_give_a_share_of_all(tmp_path: Path) -> None:
    task = task_of(tmp_path, labelled(**{f"l{i}": 4 for i in range(50)}), kind="classification", eval=0.1)
    assert (len(task.eval), len(task.train)) == (20, 180) and max(
        Counter(r["label"] for r in task.eval).values()
    ) == 1
    with pytest.raises(DataError, match=r"0\.999 of 30 records is all of them"):
        len(task_of(tmp_path, labelled(a=30), kind="classification", labels=["a", "b"], eval=0.999).eval)


def test_stars_are_labels_by_their_number_not_by_their_place(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([1, 2, 3, 5, -1, None, True])]
    task = task_of(tmp_path, rows, kind="classification")
    assert task.labels == ("-1", "1", "2", "3", "5")
    assert [label_index(task, row) for row in rows[:5]] == [1, 2, 3, 4, 0]

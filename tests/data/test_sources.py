"""Sources: each kind is read into records that know their place; what cannot be read names itself."""

import json
import pickle

import datasets
import pytest

from molora.config import TaskConfig
from molora.data.sources import records_of
from molora.disk import hub
from molora.errors import DataError

ROWS = [{"prompt": "a", "target": "1"}, {"prompt": "b", "target": "2"}, {"prompt": "c", "target": "3"}]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same rows in every local format."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.csv").write_text(
        "prompt,target\n" + "".join(f"{r['prompt']},{r['target']}\n" for r in ROWS)
    )
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": table, "dev": table.select([0])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "train.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    return tmp_path


def config(files, source, **more):
    if source in ("jsonl", "csv", "parquet"):
        return TaskConfig(source=source, train=str(files / f"rows.{source}"), **more)
    return TaskConfig(source="folder", path=str(files / source), **more)


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet", "saved", "loose"])
def test_every_local_source_gives_the_same_records(source, files):
    records = records_of(config(files, source), "train")
    assert list(records) == ROWS
    assert records[1].where.endswith((":2", ":3", "row 2"))
    assert list(records[:2]) == ROWS[:2]
    assert list(pickle.loads(pickle.dumps(records))) == ROWS  # noqa: S301 (our own bytes)
    assert records_of(config(files, source), "eval") is None
    assert list(records_of(config(files, source, train_size=2), "train")) == ROWS[:2]


def test_several_files_follow_each_other_and_splits_are_found(files):
    path = str(files / "rows.jsonl")
    two = TaskConfig(source="jsonl", train=[path, path], eval=path)
    assert list(records_of(two, "train")) == ROWS * 2
    assert list(records_of(two, "eval")) == ROWS
    assert list(records_of(config(files, "saved", eval_split="dev"), "eval")) == ROWS[:1]


def test_synthetic_splits_are_sized_and_disjoint():
    task = TaskConfig(source="synthetic", generator="reverse", train_size=20, eval_size=5)
    train, held_out = records_of(task, "train"), records_of(task, "eval")
    assert (len(train), len(held_out)) == (20, 5)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


def test_nothing_is_read_before_it_is_needed():
    records = records_of(TaskConfig(source="jsonl", train="nowhere.jsonl"), "train")
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read"):
        len(records)


def test_an_empty_file_is_refused_even_beside_a_full_one(files):
    (files / "empty.jsonl").write_text("\n")
    for names in (["empty.jsonl"], ["rows.jsonl", "empty.jsonl"]):
        task = TaskConfig(source="jsonl", train=[str(files / name) for name in names])
        with pytest.raises(DataError, match=r"empty.jsonl: has no records"):
            list(records_of(task, "train"))
    (files / "rows.csv").write_text("prompt,target\n")
    with pytest.raises(DataError, match=r"rows.csv: has no records"):
        list(records_of(config(files, "csv"), "train"))


def test_what_datasets_cannot_read_names_the_file(files):
    (files / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read: ArrowInvalid: "):
        list(records_of(config(files, "parquet"), "train"))
    (files / "rows.parquet").unlink()
    with pytest.raises(DataError, match=r"rows.parquet: there is no such file"):
        list(records_of(config(files, "parquet"), "train"))
    with pytest.raises(DataError, match=r"no split 'test'.*\n.*train, dev"):
        list(records_of(config(files, "saved", eval_split="test"), "eval"))
    with pytest.raises(DataError, match="there is no such folder"):
        list(records_of(config(files, "nowhere"), "train"))
    (files / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare \(train\): cannot be read"):
        list(records_of(config(files, "bare"), "train"))


def test_a_hub_name_that_cannot_be_reached_says_so(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(hub, "_unreachable", lambda _: None)
    with pytest.raises(DataError, match=r"some/set \(train\): cannot be read: ConnectionError: no route"):
        list(records_of(TaskConfig(source="hub", dataset="some/set"), "train"))


def test_reading_a_table_draws_no_bars(tmp_path, capfd):
    datasets.Dataset.from_dict({"prompt": ["a"], "target": ["b"]}).to_parquet(tmp_path / "a.parquet")
    datasets.utils.enable_progress_bars()
    capfd.readouterr()
    config = TaskConfig(source="parquet", train=str(tmp_path / "a.parquet"))
    assert len(records_of(config, "train")) == 1
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()

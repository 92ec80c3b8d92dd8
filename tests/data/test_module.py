"""The data module: encoded once, counted, and served as batches."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from molora.config import DataConfig
from molora.data import module as module_file
from molora.data.module import MoLoraDataModule
from molora.data.tasks import Task, TaskSet
from molora.errors import DataError


def config(**more):
    return DataConfig(tasks={"unused": {"source": "synthetic", "generator": "reverse"}}, **more)


def rows(n, prompt="ab=", target="ba"):
    return [{"prompt": f"{i}{prompt}", "target": target} for i in range(n)]


def two_tasks():
    return TaskSet.of(Task("first", 4, train=rows(5), eval=rows(2)), Task("second", 7, train=rows(3)))


def test_batches_carry_task_ids_and_every_record(tokenizer):
    data = MoLoraDataModule(config(), two_tasks(), tokenizer, batch_size=3)
    batches = list(data.train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    assert sorted(i for batch in batches for i in batch["routing_task_ids"].tolist()) == [4] * 5 + [7] * 3
    (held_out,) = data.val_dataloader()
    assert held_out["routing_task_ids"].tolist() == [4, 4]
    assert (
        MoLoraDataModule(config(), TaskSet.of(Task("a", 0, train=rows(1))), tokenizer, 2).val_dataloader()
        == []
    )


def test_records_are_encoded_once(tokenizer, monkeypatch):
    calls = []
    encode = module_file.encode
    monkeypatch.setattr(module_file, "encode", lambda *args: calls.append(1) or encode(*args))
    data = MoLoraDataModule(config(), two_tasks(), tokenizer, batch_size=3)
    for _ in range(2):
        data.setup("fit")
        list(data.train_dataloader())
        list(data.val_dataloader())
    assert len(calls) == 10


def test_the_summary_counts_what_was_cut_and_left_out(make_tokenizer, caplog):
    bare = make_tokenizer(bos=False)
    train = [
        {"prompt": "abc=", "target": "x"},  # 6 tokens with the end
        {"prompt": "abcdefgh=", "target": "x"},  # the prompt is cut
        {"prompt": "a=", "target": "xxxxxxxxxx"},  # both are cut
        {"prompt": "", "target": ""},  # nothing comes before the end, so nothing is learned
    ]
    tasks = TaskSet.of(Task("law", 2, train=train))
    data = MoLoraDataModule(config(max_length=8), tasks, bare, batch_size=2)
    with caplog.at_level(logging.WARNING):
        (counts,) = data.summary()
    assert (counts.task, counts.task_id, counts.split, counts.records) == ("law", 2, "train", 4)
    assert (counts.cut_prompts, counts.cut_targets, counts.unlabelled) == (2, 1, 1)
    assert (counts.tokens, counts.longest) == (6 + 8 + 8, 8)
    assert "2 prompts lose their beginning (50.0 %) at max_length 8" in caplog.text
    assert "1 targets lose their end (25.0 %)" in caplog.text
    assert "1 records (25.0 %) have nothing to learn" in caplog.text
    assert sum(len(batch["input_ids"]) for batch in data.train_dataloader()) == 3


def test_a_task_with_nothing_to_learn_is_refused(make_tokenizer):
    tasks = TaskSet.of(Task("law", 0, train=[{"prompt": "", "target": ""}] * 3))
    data = MoLoraDataModule(config(), tasks, make_tokenizer(bos=False), batch_size=2)
    with pytest.raises(DataError, match=r"'law': none of its 3 train records has anything to learn"):
        data.setup()


def test_a_faulty_record_names_its_line(tokenizer, tmp_path):
    path = tmp_path / "law.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    settings = DataConfig(tasks={"law": {"source": "jsonl", "train": str(path)}})
    data = MoLoraDataModule(settings, TaskSet.from_config(settings), tokenizer, batch_size=2)
    with pytest.raises(DataError, match=r"law.jsonl:2: has no field 'target'.*\n.*its fields: prompt"):
        data.setup()


def test_mixing_and_weights_reach_the_loader(tokenizer):
    tasks = TaskSet.of(Task("big", 0, train=rows(30)), Task("small", 1, train=rows(10), weight=3.0))
    for mixing, counts in {"size": [20, 20], "equal": [10, 30]}.items():
        loader = MoLoraDataModule(config(mixing=mixing), tasks, tokenizer, batch_size=4).train_dataloader()
        assert loader.counts == counts


REAL = os.environ.get("MOLORA_DATA")


@pytest.mark.skipif(REAL is None, reason="MOLORA_DATA names no folder with cl15/ and gen/")
def test_real_files_are_read_whole(tokenizer, tmp_path):
    """Every file is strict JSON lines and encodes; a language model takes the labels as text."""
    folder = Path(REAL)
    files = sorted(folder.glob("cl15/*.jsonl.gz")) + sorted(folder.glob("gen/*/*.jsonl.gz"))
    assert files
    labels = json.loads((folder / "tasks.json").read_text())["cl15"]
    tasks = {}
    for file in files:
        name = file.name.removesuffix(".jsonl.gz")
        lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
        train = [line for line in lines if json.loads(line)["split"] == "train"] or lines
        part = tmp_path / f"{name}.jsonl.gz"
        part.write_bytes(gzip.compress(b"".join(train)))
        tasks[name] = {"source": "jsonl", "train": str(part), "train_size": 300, "target": "{answer}"}
        if file.parent.name == "cl15":
            names = labels[name]["labels"]
            tasks[name] = {"source": "jsonl", "train": str(part), "kind": "classification", "labels": names}
            tasks[name]["train_size"] = 300
    settings = DataConfig(tasks=tasks, max_length=256, mixing="temperature")
    taskset = TaskSet.from_config(settings, task_type="CAUSAL_LM")
    data = MoLoraDataModule(settings, taskset, tokenizer, batch_size=8)
    assert {row.task for row in data.summary()} == set(tasks)
    assert all(row.records == min(300, len(taskset[row.task].train)) for row in data.summary())
    assert all(row.longest <= 256 and row.unlabelled == 0 for row in data.summary())


def test_a_file_that_is_trained_on_and_held_out_is_named(tokenizer, tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x", "target": "y"}\n', encoding="utf-8")
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    for held_out, said in ((a, True), ([b, a], True), (b, False), (None, False)):
        given = DataConfig(tasks={"t": {"source": "jsonl", "train": a, "eval": held_out}})
        caplog.clear()
        MoLoraDataModule(given, TaskSet.from_config(given), tokenizer, 1).setup("fit")
        assert ("is trained on and held out" in caplog.text) == said

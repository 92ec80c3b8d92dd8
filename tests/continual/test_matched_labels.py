"""Sequences over the nearest label text: which labels compete, labels by case, and what is taken away."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

import molora
from molora.continual.grow import add_expert
from molora.data.tasks import TaskSet, distinct_labels
from molora.errors import AdapterError, ConfigError
from molora.models.build import load_trained
from tests.continual.test_sequence import matrix, recipe
from tests.training.runs import write_encoder
from tests.training.test_seq2seq import losses


def task(folder, name, labels):
    """A task of a JSONL file; the label decides the text."""
    file = folder / f"{name}.jsonl"
    rows = [{"text": f"{name} {labels[i % 2] * 3} {i}", "label": labels[i % 2]} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"source": "jsonl", "kind": "classification", "train": str(file), "eval": str(file)}
    return {**common, "labels": labels, "eval_size": 10}


def sequence(tmp_path, labels, strategy="color", **train):
    base = {
        "model": str(write_encoder(tmp_path / "base")),
        "task_type": "SEQ_CLS",
        "head": "match",
    }
    tasks = {name: task(tmp_path, name, own) for name, own in labels.items()}
    whole = recipe(tmp_path / "runs", strategy)
    whole |= {"base": base, "data": {"max_length": 16, "tasks": tasks}}
    whole["train"] = {**whole["train"], **train}
    return molora.train_sequence(whole)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Where a base and a sequence on it are, and the sequence."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, sequence(folder, {"a": ["low", "high"], "b": ["odd", "even"]})


def test_an_exported_expert_is_a_lora_of_the_encoder_for_stock_peft(plain, tmp_path):
    where, run = plain
    model, tokenizer, _ = load_trained(run.path)
    folder = molora.export_lora(model, tmp_path / "lora", expert="b")
    base = AutoModel.from_pretrained(where / "base")
    alone = PeftModel.from_pretrained(base, folder).eval()
    inputs = tokenizer(["some text"], return_tensors="pt")
    model.eval()
    with torch.no_grad(), molora.routing(model, task_ids="b"):
        ours = model.get_base_model().encoder(**inputs).last_hidden_state
        theirs = alone(**inputs).last_hidden_state
        with alone.disable_adapter():
            without = alone(**inputs).last_hidden_state
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, without, atol=1e-4)


def test_an_adapter_without_its_run_says_that_it_needs_it(plain):
    _, run = plain
    with pytest.raises(AdapterError, match="whose labels only the recipe"):
        load_trained(run.adapter)


def test_a_task_added_by_hand_competes_among_its_own_labels(tmp_path):
    run = sequence(tmp_path, {"a": ["low", "high"], "b": ["odd", "even"]}, "inc_lora")
    new = {"name": "c", **task(tmp_path, "c", ["red", "blue"])}
    done = add_expert(run, {"task": new, "train": {"max_steps": 2, "lr": 1e-6, "log_every": 1}})
    own = losses(done)
    assert max(own) < 1.5 * math.log(2), "of two labels, not of six"
    seen = add_expert(
        run, {"task": new, "train": {"max_steps": 2, "lr": 1e-6, "log_every": 1}, "softmax": "seen"}
    )
    assert all(b > a for a, b in zip(own, losses(seen), strict=True))


def test_labels_that_differ_only_in_case_are_one(tmp_path):
    run = sequence(tmp_path, {"a": ["high", "low"], "b": ["High", "Low"]})
    model, _, _ = load_trained(run.path)
    assert model.get_base_model().label_vectors.shape[0] == 2
    assert matrix(run)["matrices"]["hidden"]["rows"][1][1] is not None
    assert distinct_labels([["high", "Low"], ["LOW", "odd"]]) == ["high", "Low", "odd"]
    with pytest.raises(ConfigError, match="there twice, in upper and lower case"):
        sequence(tmp_path, {"a": ["us", "US"]})


def test_joined_tasks_share_classes_whatever_the_case(tmp_path):
    from molora.data.tasks import Task

    tasks = [
        Task(n, i, [], kind="classification", labels=own)
        for i, (n, own) in enumerate([("a", ("x", "Y")), ("b", ("y", "z"))])
    ]
    assert [t.classes for t in TaskSet.of(*tasks).joined()] == [(0, 1), (1, 2)]

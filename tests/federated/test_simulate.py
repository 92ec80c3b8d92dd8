"""A simulated run: what it leaves, what a kill loses (nothing), what happens to clients that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.data.tasks import Task, TaskSet
from molora.errors import AdapterError, ConfigError, DivergedError
from molora.federated import round as rounds
from molora.federated import simulate
from molora.federated.folder import read_log
from molora.federated.partition import split
from molora.store.run_list import FINISHED, state_of
from molora.store.runs import Run
from molora.training.train import train
from tests.training.runs import ROOT, adapter_weights, assert_same_weights, recipe_for, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama", dropout=0.1)


def recipe(base: Path, output: Path, **federated: Any) -> dict[str, Any]:
    """Three clients, of which two are asked in each of three rounds."""
    made = recipe_for(base, output, max_steps=None)
    settings = {"clients": 3, "fraction": 0.7, "rounds": 3, "local_steps": 2, "min_clients": 1}
    return {**made, "federated": {**settings, **federated}}


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run."""
    return molora.federate(recipe(base, tmp_path_factory.mktemp("full")))


def test_a_run_is_like_one_of_train(full: Run) -> None:
    assert state_of(full).state == FINISHED
    assert full.report is not None and {row["task"] for row in full.report["scores"]} == {"copy", "reverse"}
    assert_same_weights(full.adapter, full.path / "rounds" / "round-3")
    kept = sorted(path.name for path in (full.path / "rounds").iterdir())
    assert kept == ["decisions.jsonl", "round-2", "round-3"]  # as train.keep_checkpoints says
    assert not (full.path / "clients").exists()
    assert [line.split(",")[0] for line in (full.path / "metrics.csv").read_text().splitlines()] == [
        "step", "2", "4", "6"
    ]  # fmt: skip
    lines = read_log(full.path / "rounds")
    assert [line["outcome"] for line in lines if "outcome" in line] == ["closed"] * 3
    assert all(line["accepted"] for line in lines)
    assert len({line["client"] for line in lines if "client" in line}) == 3  # not the same two in every round


class Stop(Exception):
    """A crash at a chosen moment."""


@pytest.mark.parametrize(
    "moment", ["between two clients", pytest.param("between the log and the adapter", marks=pytest.mark.slow)]
)
def test_an_interrupted_run_ends_as_the_whole_one(
    base: Path, full: Run, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, last = {
        "between two clients": (simulate, "optimise", 4),
        "between the log and the adapter": (rounds, "write_adapter", 2),
    }[moment]
    calls, whole = [], getattr(where, name)

    def stops(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == last:
            raise Stop
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, stops)
        with pytest.raises(Stop):
            molora.federate(recipe(base, tmp_path))
    with pytest.raises(AdapterError, match="molora federate RECIPE --resume"):
        _ = Run.find(tmp_path / "small").trained_adapter
    run = molora.federate(recipe(base, tmp_path), resume=True)
    assert_same_weights(full.adapter, run.adapter)
    assert read_log(run.path / "rounds") == read_log(full.path / "rounds")
    assert (run.path / "metrics.csv").read_text() == (full.path / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_killed_run_ends_as_the_whole_one(base: Path, full: Run, tmp_path: Path) -> None:
    code = """
import json, os, signal, sys
from molora.federated import simulate
optimise, calls = simulate.optimise, []
def killed(*given, **named):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return optimise(*given, **named)
simulate.optimise = killed
simulate.federate(json.loads(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, json.dumps(recipe(base, tmp_path))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert_same_weights(full.adapter, molora.federate(recipe(base, tmp_path), resume=True).adapter)


@pytest.mark.slow
def test_a_finished_run_is_lengthened_and_other_settings_are_refused(
    base: Path, full: Run, tmp_path: Path
) -> None:
    short = molora.federate(recipe(base, tmp_path, rounds=1))
    with pytest.raises(ConfigError, match=r"federated\.local_steps"):
        molora.federate(recipe(base, tmp_path, rounds=3, local_steps=3), resume=True)
    longer = molora.federate(recipe(base, tmp_path, rounds=3), resume=True)
    assert longer.path == short.path
    assert_same_weights(full.adapter, longer.adapter)


def test_a_client_that_diverges_sends_nothing_and_too_few_end_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = simulate.optimise, []

    def diverges(*given: Any, **named: Any) -> Any:
        calls.append(0)
        if len(calls) in (1, 3, 4):
            raise DivergedError("the loss is not finite.")
        return whole(*given, **named)

    monkeypatch.setattr(simulate, "optimise", diverges)
    with pytest.raises(AdapterError, match=r"round 1 had fewer than 2 usable updates 2 times.*\n.*missing"):
        molora.federate(recipe(base, tmp_path, min_clients=2, max_repeats=1))
    run = Run.find(tmp_path / "small")
    lines = read_log(run.path / "rounds")
    assert [line["accepted"] for line in lines if "outcome" in line] == [1, 0]
    assert [path.name for path in (run.path / "rounds").glob("round-*")] == ["round-0"]


def test_one_client_that_is_asked_for_all_steps_is_plain_training(base: Path, tmp_path: Path) -> None:
    """The same records in another order and with another seed of dropout: only where nothing is drawn it is equal."""
    made = recipe(base, tmp_path / "one", clients=1, fraction=1.0, rounds=1, local_steps=1)
    made["adapter"] |= {"lora_dropout": 0.0}
    made["train"] |= {"batch_size": 40}  # all records in the one batch
    made["base"] = str(write_base(tmp_path / "still"))
    plain = {**made, "federated": None, "train": {**made["train"], "max_steps": 1}}
    one, other = molora.federate(made), train({**plain, "output": str(tmp_path / "plain")})
    first, second = adapter_weights(one.adapter), adapter_weights(other.adapter)
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=2e-4) for key in second)
    assert any(bool(value.any()) for key, value in second.items() if key.endswith("B"))


def test_the_verbs_send_each_recipe_to_the_right_one(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="molora federate RECIPE"):
        train(recipe(base, tmp_path))
    with pytest.raises(ConfigError, match="no `federated` section"):
        molora.federate(recipe_for(base, tmp_path))
    assert not (tmp_path / "small").exists()


def tasks() -> TaskSet:
    texts = [{"prompt": str(i), "target": "x"} for i in range(101)]
    labelled = [{"text": str(i), "label": "ab"[i % 2]} for i in range(60)]
    of_labels = Task("b", 1, labelled, kind="classification", labels=("a", "b"), task_type="CAUSAL_LM")
    return TaskSet.of(Task("a", 0, texts, eval=texts[:3], task_type="CAUSAL_LM"), of_labels)


@pytest.mark.parametrize("settings", [{}, {"partition": "dirichlet", "alpha": 1.0}], ids=["iid", "dirichlet"])
def test_every_record_goes_to_one_client(settings: dict[str, Any]) -> None:
    made = simulate.load_recipe({
        "name": "x", "base": "molora/tiny", "train": {}, "adapter": {"num_experts": 2},
        "data": {"tasks": {"a": {"source": "synthetic", "generator": "copy"}}},
        "federated": {"clients": 4, **settings},
    }).federated  # fmt: skip
    assert made is not None
    parts = split(tasks(), made, seed=3)
    for task, field in (("a", "prompt"), ("b", "text")):
        given = [int(r[field]) for part in parts if task in part.ids for r in part[task].train]
        assert sorted(given) == list(range(len(tasks()[task].train)))
    assert all(not one.eval for part in parts for one in part)
    assert [part.known_ids for part in parts] == [{"a": 0, "b": 1}] * 4
    sizes = [len(part["a"].train) for part in parts if "a" in part.ids]
    assert (max(sizes) - min(sizes) <= 1) is (settings == {})
    again = split(tasks(), made, seed=3)
    assert [[list(t.train) for t in p] for p in again] == [[list(t.train) for t in p] for p in parts]


def test_a_client_without_records_is_refused() -> None:
    made = simulate.load_recipe({
        "name": "x", "base": "molora/tiny", "train": {}, "adapter": {"num_experts": 2},
        "data": {"tasks": {"a": {"source": "synthetic", "generator": "copy"}}}, "federated": {"clients": 500},
    }).federated  # fmt: skip
    assert made is not None
    with pytest.raises(ConfigError, match=r"client \d+ of 500 gets no training record"):
        split(tasks(), made, seed=0)

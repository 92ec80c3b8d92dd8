"""What gates decide is among the metrics, changes nothing of training, and a planted collapse is told once."""

from __future__ import annotations

import csv
import logging

import pytest

from molora.evaluation import findings
from molora.store.runs import Run
from molora.training import optimise
from molora.training.live_routing import LiveRouting
from molora.training.train import train
from tests.training.runs import assert_same_weights, recipe_for, write_base
from tests.zoo import molora_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def metrics(run: Run) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_shares_and_entropy_are_metrics_and_change_nothing(base, tmp_path, monkeypatch):
    recipe = recipe_for(base, tmp_path / "watched", max_steps=10, log_every=1)
    watched = train(recipe)
    rows = metrics(watched)
    seen = [row for row in rows if row["routing/entropy"]]
    assert [row["step"] for row in seen] == ["5", "10"]
    for row in seen:
        shares = [float(row[f"routing/share/expert_{i}"]) for i in range(3)]
        assert (
            sum(shares) == pytest.approx(1.0, abs=1e-4) and 0 < float(row["routing/entropy"]) < 1.1
        )  # log 3
    monkeypatch.setattr(LiveRouting, "watches", staticmethod(lambda model: False))
    alone = train({**recipe, "output": str(tmp_path / "alone")})
    assert "routing/entropy" not in metrics(alone)[0]
    assert_same_weights(watched.adapter, alone.adapter)
    assert [row["loss"] for row in metrics(alone)] == [row["loss"] for row in rows]


def test_a_collapse_is_told_once_with_its_remedy(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(findings, "ruled_gates", lambda rows: {row["gate"]: "expert_1" for row in rows})
    monkeypatch.setattr(optimise, "EVERY", 1)
    with caplog.at_level(logging.WARNING, logger="molora.training.live_routing"):
        train(recipe_for(base, tmp_path, max_steps=4, log_every=1))
    (said,) = [r.getMessage() for r in caplog.records if r.name == "molora.training.live_routing"]
    assert said.startswith("step ") and "expert_1 in" in said and "aux_losses.balance" in said


def test_gates_that_follow_task_ids_are_not_watched():
    assert LiveRouting.watches(molora_model("llama", "top2-group"))
    assert not LiveRouting.watches(molora_model("llama", "task-group"))
    assert not LiveRouting.watches(molora_model("llama", "constant-linear"))

"""The table of gates that specialise: it is that of its JSON, every arm is a valid recipe, and the default is the best."""

from __future__ import annotations

import json
import statistics

import pytest

from eval import specialisation
from eval.quickstart_vs_lora import RECIPE
from molora.config import load_recipe
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import RoutingSummary

RECORD = json.loads(specialisation.TARGET.read_text(encoding="utf-8"))
DEFAULT = "prompt, task_label 1"


@pytest.mark.parametrize("arm", specialisation.ARMS)
def test_every_arm_is_a_valid_recipe(arm):
    config = load_recipe(RECIPE, [*specialisation.ARMS[arm], "adapter.router=null"])
    assert (config.adapter.router, config.adapter.num_experts) == (None, 4)


def test_the_quickstart_is_the_arm_that_specialises():
    mine, arm = load_recipe(RECIPE), load_recipe(RECIPE, specialisation.ARMS[DEFAULT])
    assert mine.adapter == arm.adapter
    for seed in RECORD["results"][DEFAULT].values():
        assert seed["specialisation"] >= 0.5
        assert min(seed["hidden"], seed["given"]) >= 0.99


def test_a_run_is_read_from_its_report():
    rows = {"pig": {"a": 1.0, "b": 0.0}, "back": {"a": 0.0, "b": 1.0}}
    values = {("pig", "gate"): 1.0, ("back", "gate"): 0.5, ("pig", "task"): 0.25, ("back", "task"): 0.75}
    scores = [Score(task, mode, "exact_match", value, 4) for (task, mode), value in values.items()]
    found = specialisation.found_in(Report(scores=scores, routing=RoutingSummary("gate", 9, rows, [])))
    assert (found["hidden"], found["given"], found["lowest given"]) == (0.75, 0.5, 0.25)
    assert (found["specialisation"], found["weights"]) == (1.0, rows)


def test_the_committed_page_is_that_of_the_committed_runs():
    assert specialisation.TARGET.with_suffix(".md").read_text(encoding="utf-8") == specialisation.page(
        RECORD["results"]
    )
    assert RECORD["arms"] == specialisation.ARMS
    for seeds in RECORD["results"].values():
        assert all(len(run["weights"]) == 4 for run in seeds.values())
        assert 0 <= statistics.fmean(run["specialisation"] for run in seeds.values()) <= 1

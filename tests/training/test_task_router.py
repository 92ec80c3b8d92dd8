"""A run with a router ends with one that names its tasks, and growing it adds the new task's row."""

from __future__ import annotations

import pytest
import torch

import molora
from molora.cli.inspect import describe
from molora.continual.grow import add_expert
from molora.data.prompts import encode
from molora.evaluation.naming import NAMED, NOTHING, naming
from molora.evaluation.report import Report
from molora.evaluation.score import Limits
from molora.models.build import load_trained, tasks_of
from molora.models.task_router import features, router_of

EVAL = {"batch_size": 8, "max_new_tokens": 2, "modes": ["gate", "task"]}


def synthetic(name):
    return {"source": "synthetic", "generator": name, "train_size": 40, "eval_size": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return molora.train(
        {
            "name": "named",
            "output": str(tmp_path_factory.mktemp("runs")),
            "base": "molora/tiny",
            "adapter": {
                "num_experts": 2, "r": 2, "target_modules": ["v_proj"], "gate": "task", "router": "ridge",
                "tasks": {"pig": ["expert_0"], "spell": ["expert_1"]},
            },
            "data": {"max_length": 48, "tasks": {name: synthetic(name) for name in ("pig", "spell")}},
            "train": {"max_steps": 1, "batch_size": 4},
            "eval": EVAL,
        }
    )  # fmt: skip


def test_training_teaches_the_router(trained):
    model, tokenizer, config = load_trained(trained.path)
    assert config.adapter.router.kind == "ridge"
    assert router_of(model, "default").counts.tolist() == [40, 40]
    assert describe(model)["router"]["learned"] == {"pig": 40, "spell": 40}
    named = molora.route(model, tokenizer, ["spell(never)=", "pig(seen)="])
    assert [row.task for row in named] == ["spell", "pig"]
    scores = {(row["task"], row["mode"]): row["value"] for row in trained.report["scores"]}
    assert {mode for _, mode in scores} == {"gate", "task"}  # without ids there is an answer too
    assert trained.report["facts"][NAMED] == "pig 4 of 4, spell 4 of 4"
    assert all(scores[task, "gate"] == scores[task, "task"] for task in ("pig", "spell"))


def test_what_the_others_are_taken_for_is_said(trained):
    model, tokenizer, config = load_trained(trained.path)
    router = router_of(model, "default")
    router.means = router.means.flip(0)
    tasks = list(tasks_of(config))
    found = naming(model, tokenizer, tasks, Limits())
    assert found.facts()[NAMED] == "pig 0 of 4 (4 as spell), spell 0 of 4 (4 as pig)"
    assert found.named == {"pig": {"spell": 4}, "spell": {"pig": 4}} and found.names == ["pig", "spell"]
    router.settings.unknown = "base"
    router.floors = router.floors + 1e6
    expected = "pig 0 of 4 (4 as nothing known), spell 0 of 4 (4 as nothing known)"
    found = naming(model, tokenizer, tasks, Limits())
    assert found.facts()[NAMED] == expected and found.refused == {"pig": 1.0, "spell": 1.0}
    assert found.names == ["pig", "spell", NOTHING]


def test_the_report_shows_what_prompts_are_taken_for(trained):
    report = Report.from_json((trained.path / "report.json").read_text())
    assert report.naming.named == {"pig": {"pig": 4}, "spell": {"spell": 4}}
    model, tokenizer, config = load_trained(trained.path)
    router, task_map = router_of(model, "default"), model.task_ids
    for task in tasks_of(config):  # a router that never knew the task, but for the spread they share
        prompts = [list(encode(task, record, tokenizer, 48).prompt) for record in task.eval]
        read = features(model, tokenizer, prompts, "default", 8)
        other = next(i for i in task_map.values() if i != task_map[task.name])
        log_density = router.namer.log_densities(read)[:, router.learned.index(other)]
        floor = router.floors[router.ids.index(other)]
        assert report.naming.refused[task.name] == float((log_density < floor).double().mean())
    page = (trained.path / "report.html").read_text()
    assert "What the router takes held-out prompts for" in page and "as spell</th>" in page


def test_growing_teaches_it_the_new_task_alone(trained):
    grown = add_expert(trained, {"task": {"name": "back", **synthetic("back")}, "train": {"max_steps": 1}})
    before = router_of(load_trained(trained.path)[0], "default")
    model, tokenizer, _ = load_trained(grown.path)
    after = router_of(model, "default")
    assert after.counts.tolist() == [40, 40, 40]
    assert grown.report["facts"][NAMED] == "pig 4 of 4, spell 4 of 4, back 4 of 4"
    assert torch.equal(after.means[:2], before.means)
    named = molora.route(model, tokenizer, ["back(never)=", "spell(never)=", "pig(seen)="])
    assert [row.task for row in named] == ["back", "spell", "pig"]


def test_an_adapter_without_a_router_is_left_alone(tmp_path):
    recipe = {
        "name": "plain", "output": str(tmp_path), "base": "molora/tiny",
        "adapter": {"num_experts": 2, "r": 2, "target_modules": ["v_proj"], "gate": "task"},
        "data": {"max_length": 48, "tasks": {name: synthetic(name) for name in ("pig", "spell")}},
        "train": {"max_steps": 1, "batch_size": 4},
        "eval": EVAL,
    }  # fmt: skip
    run = molora.train(recipe)
    assert {row["mode"] for row in run.report["scores"]} == {"task"}
    assert run.config.adapter.router is None
    assert describe(load_trained(run.path)[0])["router"] is None

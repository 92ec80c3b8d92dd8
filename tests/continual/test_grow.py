"""A run is trained, evaluated, inspected and grown, as a user would; the old run stays as it was."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import molora
from molora import ConfigError
from molora.cli.main import _run, app
from molora.continual.grow import UNCHANGED, add_expert
from molora.disk.manifest import sha256
from molora.evaluation.naming import NAMED
from molora.models.build import load_trained
from molora.models.task_router import router_of
from molora.store.adapter import read_config
from tests.training.runs import recipe_for, write_base

TASK = {"name": "upper", "source": "synthetic", "generator": "upper", "train_size": 12, "eval_size": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    recipe = recipe_for(write_base(folder / "base"), folder / "out", max_steps=2)
    recipe["eval"] = {"batch_size": 4, "max_new_tokens": 3, "modes": ["gate", "task", "base"]}
    return molora.train(recipe)


def hashes(run):
    return {file: sha256(file) for file in sorted(run.path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def grown(trained):
    before = hashes(trained)
    run = add_expert(trained, {"task": TASK, "train": {"max_steps": 3}, "aux_losses": {"orthogonal": 0.1}})
    assert hashes(trained) == before, "the old run is not touched"
    return run


def test_a_run_without_a_router_gets_one_that_knows_all_tasks(trained, grown):
    assert trained.config.adapter.router is None and grown.config.adapter.router.kind == "gaussian"
    model, _, _ = load_trained(grown.path)
    assert router_of(model, "default").seen == {0: 20, 1: 13, 2: 12}
    assert read_config(grown.adapter).isolated_experts == ["upper"]
    rows = {(row["task"], row["mode"]): row["value"] for row in grown.report["scores"]}
    before = {(row["task"], row["mode"]): row["value"] for row in grown.report["before"]}
    assert all(rows[task, "gate"] == before[task, "gate"] for task in ("copy", "reverse"))
    named = grown.report["facts"][NAMED]
    assert "copy 4 of 4" in named and "reverse 4 of 4" in named and "upper 4 of 4" in named


def test_growth_without_a_router_is_as_it_was(trained):
    run = add_expert(trained, {"task": TASK, "train": {"max_steps": 1}, "router": None})
    config = read_config(run.adapter)
    assert config.router is None and config.isolated_experts == [] and NAMED not in run.report["facts"]


def test_a_grown_run_has_one_more_expert_and_keeps_the_old_tasks_bit_equal(trained, grown):
    old, new = read_config(trained.adapter), read_config(grown.adapter)
    assert new.expert_names == [*old.expert_names, "upper"] and new.frozen_experts == old.expert_names
    assert new.task_ids == {**old.task_ids, "upper": 2}
    assert grown.report["facts"][UNCHANGED] is True
    assert {row["task"] for row in grown.report["before"]} == {"copy", "reverse", "upper"}
    assert {(row["task"], row["mode"]) for row in grown.report["scores"]} == {
        (task, mode) for task in ("copy", "reverse", "upper") for mode in ("gate", "task", "base")
    }
    assert grown.config.name == "small-upper" and "upper" in grown.config.data.tasks
    a, b = load_trained(trained.path)[0], load_trained(grown.path)[0]
    for name, bank in a.named_modules():
        if name.endswith("molora_experts.default"):
            other = b.get_submodule(name)
            for i in range(3):
                assert torch.equal(bank.expert(i).A, other.expert(i).A)
            assert other.expert(3).B.abs().max() > 0


def test_a_grown_run_can_be_grown_again(grown):
    again = add_expert(
        grown, {"task": {**TASK, "name": "sort", "generator": "sort"}, "train": {"max_steps": 1}}
    )
    assert read_config(again.adapter).expert_names[-2:] == ["upper", "sort"]
    assert again.report["facts"][UNCHANGED] is True


def test_a_router_that_could_not_learn_is_refused_before_anything_costs_time(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    monkeypatch.setattr("molora.continual.grow._scores_before", None)
    with pytest.raises(ConfigError, match="k-means needs scikit-learn"):
        add_expert(trained, {"task": TASK, "router": "prototypes"})


def test_the_nearest_expert_is_that_of_the_task_the_prompts_are_like(tmp_path):
    recipe = recipe_for(write_base(tmp_path / "base"), tmp_path / "out", max_steps=2)
    tasks = {"copy": ["one"], "reverse": {"one": 0.2, "two": 0.8}}
    recipe["adapter"] = {
        "num_experts": 2,
        "expert_names": ["one", "two"],
        "r": 2,
        "gate": "task",
        "tasks": tasks,
    }
    recipe["eval"]["modes"] = ["task"]
    trained = molora.train(recipe)
    again = {**TASK, "name": "again", "generator": "reverse"}
    train = {"max_steps": 1, "lr": 1e-7}
    run = add_expert(trained, {"task": again, "expert": {"init": "nearest"}, "train": train})
    assert run.report["facts"]["the new expert started"] == (
        "as two: 12 of 12 of its prompts are most like those of reverse"
    )
    model, _, _ = load_trained(run.path)
    for module in model.modules():
        if hasattr(module, "molora_experts") and "default" in module.molora_experts:
            bank = module.molora_experts["default"]
            torch.testing.assert_close(bank.expert(2).delta(), bank.expert(1).delta(), atol=1e-5, rtol=1e-3)
            assert (bank.expert(2).delta() - bank.expert(0).delta()).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"expert\.init: nearest asks the adapter's router"):
        add_expert(trained, {"task": again, "expert": {"init": "nearest"}, "router": None})


def test_growing_twice_under_one_name_is_refused_and_writes_nothing(trained, grown, tmp_path):
    known = sorted((trained.path.parents[1]).iterdir())
    with pytest.raises(ConfigError, match="has task 'upper' already"):
        add_expert(grown, {"task": TASK})
    with pytest.raises(ConfigError, match="has expert 'expert_1' already"):
        add_expert(trained, {"task": TASK, "expert": {"name": "expert_1"}})
    with pytest.raises(ConfigError, match="has task 'COPY' already"):
        add_expert(trained, {"task": {**TASK, "name": "COPY"}})
    with pytest.raises(ConfigError, match="has expert 'Expert_1' already"):
        add_expert(trained, {"task": TASK, "expert": {"name": "Expert_1"}})
    with pytest.raises(ConfigError, match="load: is smooth only through the noise"):
        add_expert(trained, {"task": TASK, "aux_losses": {"load": 0.1}})
    with pytest.raises(ConfigError, match="weight: does nothing"):
        add_expert(trained, {"task": {**TASK, "weight": 2.0}})
    with pytest.raises(ConfigError, match="softmax acts only"):
        add_expert(trained, {"task": TASK, "softmax": "seen"})
    assert sorted((trained.path.parents[1]).iterdir()) == known


def test_evaluate_scores_what_is_asked_and_keeps_the_runs_own_report(trained):
    before = sha256(trained.path / "report.json")
    report = molora.evaluate(trained, tasks=["copy"], modes=["base"])
    assert report.tasks == ["copy"] and report.modes == ["base"]
    assert sha256(trained.path / "report.json") == before
    assert (trained.path / "evaluations" / "1" / "report.json").is_file()
    with pytest.raises(ConfigError, match=r"unknown task 'cpy'. Did you mean 'copy'"):
        molora.evaluate(trained, tasks=["cpy"])
    with pytest.raises(ConfigError, match="holds no data"):
        molora.evaluate(trained.adapter)
    assert molora.evaluate(trained.adapter, recipe=trained.config, modes=["base"]).tasks == [
        "copy",
        "reverse",
    ]


def test_the_verbs_on_a_run(trained, capsys):
    def call(*arguments):
        code = _run([str(a) for a in arguments])
        return code, capsys.readouterr()

    code, shown = call("eval", trained.path, "--json", "--mode", "gate")
    assert code == 0 and json.loads(shown.out)["scores"][0]["mode"] == "gate"
    code, shown = call("eval", trained.path, "--mode", "base", "--fail-under", "copy=1.0")
    assert code == 6 and "below the threshold" in shown.err
    code, shown = call("eval", trained.path, "--task", "nobody")
    assert code == 2 and "Known tasks: copy, reverse" in shown.err
    code, shown = call("inspect", trained.path)
    assert (
        code == 0 and "gates" in shown.out and "task x expert" in shown.out and "task_expert.png" in shown.out
    )
    code, shown = call("inspect", trained.adapter, "--json")
    assert code == 0 and set(json.loads(shown.out)) >= {"parameters", "experts", "tasks", "init"}
    code, shown = call("add-expert", trained.path, "--task", "x")
    assert code == 2 and "--synthetic GENERATOR" in shown.err
    small = ("task.train_size=12", "task.eval_size=4", "train.max_steps=1")
    code, shown = call("add-expert", trained.path, "--task", "lower", "--synthetic", "lower", *small)
    assert code == 0 and "bit-equal with task ids given: yes" in shown.out
    code, shown = call("eval", trained.path.parent / "nowhere")
    assert code == 2 and "does not exist" in shown.err


def test_help_of_every_verb_gives_an_example():
    for verb in ("train", "eval", "inspect", "add-expert", "validate"):
        result = CliRunner().invoke(app, [verb, "--help"])
        assert result.exit_code == 0 and f"Example: molora {verb}" in result.output


def test_a_strategy_accompanies_the_new_expert(trained):
    grow = {"task": TASK, "train": {"max_steps": 2, "log_every": 1}}
    run = add_expert(trained, {**grow, "strategy": {"kind": "o_lora", "coefficient": 0.7}})
    head, *rows = (run.path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    values = [float(row.split(",")[head.split(",").index("continual/orthogonal")]) for row in rows if row]
    assert len(values) == 2 and all(value > 0 for value in values)
    with pytest.raises(ConfigError, match="needs what a sequence keeps"):
        add_expert(trained, {**grow, "strategy": "inf_lora"})

"""The study of mixtures against one LoRA: its arms are of equal size, its cells resume, its page is that of its cells."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eval import mixture_vs_lora as study
from eval.mixture_vs_lora_grid import ARMS, FITTED, LORAS, SUITES, Cell, adapter, best_factor, missing
from eval.mixture_vs_lora_page import allowances, differences, page, verdict
from eval.mixture_vs_lora_tasks import PLACES, conflicting_tasks
from eval.quickstart_vs_lora import trainable
from molora.config import load_recipe
from molora.models.build import tasks_of

OWN_DATA = [name for name, suite in SUITES.items() if suite.base == "molora/tiny"]


def cell(arm, factor, seed, score, suite="embedded"):
    return {"suite": suite, "arm": arm, "factor": factor, "seed": seed, "scores": {"a": score, "b": score}}


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_conflicting_tasks_ask_different_things_of_the_same_words(tmp_path):
    tasks = conflicting_tasks(tmp_path, 32, told=False)
    assert len(tasks) == 32
    rows = {name: rows_of(task["train"]) for name, task in tasks.items()}
    prompts = {tuple(row["prompt"] for row in chosen) for chosen in rows.values()}
    assert len(prompts) == 1
    answers = {tuple(row["target"] for row in chosen) for chosen in rows.values()}
    assert len(answers) == 32
    word, (first, second) = rows["letters5"][0]["prompt"], PLACES[5]
    assert rows["letters5"][0]["target"] == word[first] + word[second]
    held_out = {row["prompt"] for row in rows_of(tasks["letters0"]["eval"])}
    assert not held_out & set(next(iter(prompts)))


def test_a_prompt_that_tells_the_task_tells_each_apart(tmp_path):
    tasks = conflicting_tasks(tmp_path, 32, told=True)
    first = {rows_of(task["train"])[0]["prompt"] for task in tasks.values()}
    assert len(first) == 32


@pytest.mark.parametrize("suite", OWN_DATA)
@pytest.mark.parametrize("arm", ARMS)
def test_every_cell_is_a_valid_recipe(suite, arm, tmp_path):
    made = load_recipe(study.recipe(Cell(suite, arm, 3, 1), tmp_path, None))
    assert made.train.lr == pytest.approx(3 * SUITES[suite].lr)
    assert made.adapter.num_experts == len(made.data.tasks) == SUITES[suite].experts


def test_an_alpha_that_allows_for_the_gate_gives_an_even_mixture_the_scale_of_one_lora():
    for suite in SUITES.values():
        plain, raised = (adapter(arm, suite) for arm in ("soft", "soft, gate allowed for"))
        even = 1 / suite.experts
        assert even * raised["lora_alpha"] / raised["r"] == plain["lora_alpha"] / plain["r"] == 2


@pytest.mark.parametrize("suite", ["conflict8", "embedded"])
def test_all_arms_have_as_many_parameters(suite, tmp_path):
    sizes, ranks = {}, {}
    for arm in ("top-2", "lora", *FITTED, "task"):
        this = Cell(suite, arm, 1, 0)
        config = load_recipe(study.recipe(this, tmp_path, None))
        model, _, ranks[arm] = study.build(this, config, tasks_of(config))
        sizes[arm] = trainable(model)
    assert sizes["top-2"] <= sizes["lora"] <= sizes["top-2"] * (1 + 1 / ranks["lora"])
    assert sizes["hydralora"] == pytest.approx(sizes["top-2"], rel=0.5 / ranks["hydralora"])
    # Those of cores grow in part as the square of the rank.
    assert sizes["cores"] == pytest.approx(sizes["top-2"], rel=1 / ranks["cores"])
    assert 0.8 * sizes["top-2"] < sizes["task"] <= sizes["top-2"]


def test_the_best_rate_of_the_first_seed_is_run_with_the_others():
    suite = SUITES["embedded"]
    swept = [cell(arm, f, 0, 0.5 + 0.1 * (f == 3)) for arm in suite.arms for f in suite.factors]
    assert best_factor(swept[1:], "embedded", suite.arms[0]) is None
    assert best_factor(swept, "embedded", "lora") == 3
    planned = list(missing(swept, ["embedded"]))
    assert {c.factor for c in planned} == {3}
    assert [c.seed for c in planned] == [1] * len(suite.arms) + [2] * len(suite.arms)
    first = list(missing([], ["embedded"]))
    assert {c.seed for c in first} == {0}
    assert len(first) == len(suite.arms) * len(suite.factors)


def test_an_arm_wins_where_the_interval_over_seeds_leaves_out_0():
    runs = {seed: cell("soft", 3, seed, 0.6 + 0.01 * seed) for seed in (0, 1, 2)}
    other = {seed: cell("lora", 1, seed, 0.5 + 0.01 * seed) for seed in (0, 1, 3)}
    assert differences(runs, other) == pytest.approx([0.1, 0.1])
    assert verdict([0.1, 0.11, 0.1]) == "wins"
    assert verdict([-0.1, -0.11, -0.1]) == "loses"
    assert verdict([0.1, -0.1, 0.05]) == "ties"
    assert verdict([0.1]) == ""


def test_a_raised_scale_is_compared_with_its_plain_arm():
    suite = SUITES["embedded"]
    arms = {"top-2": 0.5, "top-2, gate allowed for": 0.6}
    cells = [
        cell(arm, factor, seed, value - 0.1 * (factor != 3))
        for arm, value in arms.items()
        for factor in suite.factors
        for seed in suite.seeds
    ]
    assert allowances(cells, "embedded") == "top-2 10.0 ± 0.0 wins"
    assert allowances(cells[:9], "embedded") == ""


def test_the_committed_page_is_that_of_the_committed_cells():
    cells = study.load_cells(study.CELLS)
    assert study.CELLS.with_suffix(".md").read_text(encoding="utf-8") == page(cells)
    for found in cells:
        expected = SUITES[found["suite"]]
        assert (found["steps"], found["batch"]) == (expected.steps, expected.batch)
        assert len(found["scores"]) == expected.experts
        assert (found["experts"] is None) == (found["arm"] in LORAS)


def test_cells_resume_and_reach_the_page(tmp_path, monkeypatch):
    short = dataclasses.replace(SUITES["conflict8"], steps=2, arms=("lora", "soft"), factors=(3,), seeds=(0,))
    monkeypatch.setitem(SUITES, "conflict8", short)
    played = []
    play = study.play
    monkeypatch.setattr(study, "play", lambda cell, data: (played.append(cell.arm), play(cell, data))[1])
    study.run_grid(["conflict8"], None, tmp_path)
    study.run_grid(["conflict8"], None, tmp_path)
    assert played == ["lora", "soft"]
    cells = study.load_cells(tmp_path)
    assert {c["arm"] for c in cells} == {"lora", "soft"}
    assert not list(tmp_path.glob("*.claim"))
    text = page(cells)
    assert "| soft | 8 x 1 |" in text
    assert "conflicting tasks" in text

"""Shapley values against games whose solution is known, and of a real mixture."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from molora import ConfigError
from molora.data.clusters import inference
from molora.evaluation.attribution import coalitions, shapley
from molora.evaluation.counterfactual import AS_IT_IS, BASE, counterfactuals
from molora.evaluation.report import Report, Score
from molora.evaluation.score import Limits
from molora.report.html import render
from molora.report.tables import shapley_table
from tests.evaluation.test_runner import build, task, tokenizer_and_base

__all__ = ["tokenizer_and_base"]


def test_gloves_a_player_who_does_nothing_and_an_additive_game():
    """One left glove and two right ones: the pair is worth 1, of which the left one makes two thirds."""
    gloves = {
        s: float("left" in s and bool(s & {"right", "other"})) for s in coalitions(["left", "right", "other"])
    }
    assert shapley(gloves, ["left", "right", "other"]) == pytest.approx(
        {"left": 2 / 3, "right": 1 / 6, "other": 1 / 6}
    )
    worth = {"a": 0.5, "b": -0.25, "idle": 0.0}
    sums = {s: 1.0 + sum(worth[name] for name in s) for s in coalitions([*worth])}
    assert shapley(sums, [*worth]) == pytest.approx(worth)


def test_it_is_the_mean_over_all_orders_of_joining():
    players = ["a", "b", "c", "d"]
    draw = torch.Generator().manual_seed(0)
    value = {s: float(torch.rand((), generator=draw, dtype=torch.float64)) for s in coalitions(players)}
    joined = dict.fromkeys(players, 0.0)
    orders = [*permutations(players)]
    for order in orders:
        for i, player in enumerate(order):
            joined[player] += value[frozenset(order[: i + 1])] - value[frozenset(order[:i])]
    assert shapley(value, players) == pytest.approx(
        {k: v / len(orders) for k, v in joined.items()}, abs=1e-12
    )


def test_of_a_mixture_they_sum_to_what_the_experts_add(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base, gate="soft")
    with inference(model):
        found = counterfactuals(
            model, tokenizer, [task("a", 0, "loss")], mode="gate", limits=Limits(batch_size=2), records=3, attribute=True,
        )  # fmt: skip
    row, one, two = found.changed["a"], *model.expert_names
    assert sum(found.shapley["a"].values()) == pytest.approx(row[AS_IT_IS] - row[BASE])
    alone, without = found.without["a"][two] - row[BASE], row[AS_IT_IS] - found.without["a"][one]
    assert found.shapley["a"][one] == pytest.approx((alone + without) / 2)

    report = Report(scores=[Score("a", "gate", "loss", 1.0, 3)], counterfactuals=found)
    assert Report.from_json(report.to_json()).counterfactuals == found
    assert "Shapley values, in nats per token" in render(report, title="t")
    assert shapley_table(found).row_count == 2


def test_too_many_experts(tokenizer_and_base):
    model = build(tokenizer_and_base)
    for i in range(7):
        model.add_expert(f"more_{i}")
    with pytest.raises(ConfigError, match="at most 8 experts, not 9"):
        counterfactuals(model, tokenizer_and_base[0], [task("a", 0, "loss")], mode="gate", attribute=True)

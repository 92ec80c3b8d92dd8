"""Routing matrices and dead experts on tables small enough to check by eye."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.evaluation.findings import advice
from molora.evaluation.measures import dead_experts, specialisation
from molora.evaluation.routing import (
    RoutingSummary,
    expert_shares,
    summarise,
)


def row(gate, layer, expert, share, weight):
    return {"gate": gate, "layer": layer, "expert": expert, "share": share, "mean_weight": weight,
            "top1_share": share, "entropy": 0.5}  # fmt: skip


GATES = [
    row("layers.0.attn", 0, "a", 0.75, 0.8),
    row("layers.0.attn", 0, "b", 0.25, 0.2),
    row("layers.0.mlp", 0, "a", 0.25, 0.4),
    row("layers.0.mlp", 0, "b", 0.75, 0.6),
    row("layers.1.attn", 1, "a", 1.0, 1.0),
    row("layers.1.attn", 1, "b", 0.0, 0.0),
]


def test_layer_matrix_averages_the_gates_of_a_layer():
    summary = RoutingSummary("gate", 10, {}, GATES)
    matrix = summary.layer_expert()
    assert (matrix.rows, matrix.columns) == (["0", "1"], ["a", "b"])
    assert matrix.values[0] == pytest.approx([0.6, 0.4])
    assert matrix.values[1] == pytest.approx([1.0, 0.0])
    prompts = row("prompts", None, "a", 1.0, 1.0)  # a gate that stands in no block is listed by its name
    assert RoutingSummary("gate", 10, {}, [*GATES, prompts]).layer_expert().rows == ["0", "1", "prompts"]


def test_task_matrix_fills_experts_a_task_never_met():
    summary = RoutingSummary("task", 10, {"law": {"a": 1.0}, "news": {"b": 0.7, "c": 0.3}})
    matrix = summary.task_expert()
    assert (matrix.rows, matrix.columns) == (["law", "news"], ["a", "b", "c"])
    assert matrix.values == [[1.0, 0.0, 0.0], [0.0, 0.7, 0.3]]


def test_shares_are_means_over_gates():
    assert expert_shares(GATES) == pytest.approx({"a": 2 / 3, "b": 1 / 3})


def test_dead_is_below_a_tenth_of_an_even_share():
    # four experts: an even share is 0.25, the bar 0.025
    shares = {"a": 0.5, "b": 0.4501, "c": 0.0249, "d": 0.025}
    assert dead_experts(shares) == ["c"]
    assert dead_experts({"only": 0.0}) == []


def test_summary_finds_its_dead_expert_and_says_what_to_do():
    gates = [row("g", 0, "a", 0.99, 0.9), row("g", 0, "b", 0.01, 0.1)]
    summary = RoutingSummary("gate", 5, {}, gates)
    assert summary.dead_experts() == ["b"]
    assert "aux_losses.balance" in advice(["b"], mode="gate")
    assert "remove_expert" in advice(["b"], mode="task")
    assert advice([], mode="gate") is None
    assert "more steps" in advice(["b"], mode="gate", grown=True)


def test_tasks_recorded_alone_make_one_summary_in_which_tokens_weigh_the_same():
    law = [
        row("g0", 0, "a", 1.0, 0.9),
        row("g0", 0, "b", 0.0, 0.1),
        row("g1", 1, "a", 0.5, 0.5),
        row("g1", 1, "b", 0.5, 0.5),
    ]
    news = [row("g0", 0, "a", 0.0, 0.3), row("g0", 0, "b", 1.0, 0.7)]
    summary = summarise("gate", {"law": (30, law), "news": (10, news)})
    assert summary.tokens == 40
    assert summary.by_task["law"] == pytest.approx({"a": 0.7, "b": 0.3})
    assert summary.by_task["news"] == pytest.approx({"a": 0.3, "b": 0.7})
    first = summary.gates[0]
    assert (first["gate"], first["layer"], first["expert"]) == ("g0", 0, "a")
    assert first["share"] == pytest.approx(0.75)
    assert first["mean_weight"] == pytest.approx(0.75)


def test_a_summary_of_nothing_is_empty_not_an_error():
    summary = summarise("gate", {"law": (0, [])})
    assert summary.shares() == {}
    assert summary.dead_experts() == []


def test_an_expert_each_is_1_and_one_split_for_all_is_0():
    alone = [[float(task == expert) for expert in range(4)] for task in range(4)]
    assert specialisation(alone) == pytest.approx(1.0)
    assert specialisation([[0.25] * 4] * 4) == pytest.approx(0.0)
    assert specialisation([[0.7, 0.2, 0.1]] * 3) == pytest.approx(0.0)  # uneven, but alike
    assert specialisation([[1.0, 0.0], [1.0, 0.0]]) == 0.0  # collapse tells nothing either


def test_1_is_what_so_many_tasks_and_experts_allow():
    two_each = [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    assert specialisation(two_each) == pytest.approx(1.0)
    assert specialisation([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]) == pytest.approx(1.0)


def test_half_shared_has_its_closed_form():
    # H(3/4, 1/4) - H(1/2, 1/2) / 2, over log 2
    expected = (0.75 * math.log(4 / 3) + 0.25 * math.log(4) - 0.5 * math.log(2)) / math.log(2)
    assert specialisation([[1.0, 0.0], [0.5, 0.5]]) == pytest.approx(expected)
    # Rows are shares, whatever they sum to; a task on the base alone has none.
    assert specialisation([[0.1, 0.0], [3.0, 3.0]]) == pytest.approx(expected)
    assert specialisation([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]) == pytest.approx(expected)


def test_where_there_is_nothing_to_tell_apart_there_is_no_number():
    assert specialisation([]) is None
    assert specialisation([[1.0, 0.0]]) is None
    assert specialisation([[1.0], [1.0]]) is None
    assert specialisation([[2.0, -1.0], [0.0, 1.0]]) is None
    summary = RoutingSummary("gate", 5, {"law": {"a": 1.0, "b": 0.0}, "news": {"b": 1.0}})
    assert summary.specialisation() == 1.0


@given(st.lists(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), min_size=2, max_size=5), st.randoms())
def test_it_stays_between_0_and_1_and_ignores_order(weights, random):
    found = specialisation(weights)
    assert 0 <= found <= 1
    shuffled = random.sample(weights, len(weights))
    columns = random.sample(range(3), 3)
    assert specialisation([[row[c] for c in columns] for row in shuffled]) == pytest.approx(found, abs=1e-9)

"""Every number of what gates did, on hand-made routings whose closed form is known: perfect, uniform, one dead, two merged."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.evaluation.measures import (
    agreement,
    dead_experts,
    drift,
    imbalance,
    information,
    ruled_gates,
    specialisation,
    wilson,
)

PERFECT = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
UNIFORM = [[0.25] * 4] * 4
ONE_DEAD = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
MERGED = [[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]  # two tasks share an expert


def test_perfect_specialisation():
    assert information(PERFECT) == pytest.approx(2.0)
    assert specialisation(PERFECT) == pytest.approx(1.0)
    assert imbalance([0.25] * 4) == pytest.approx((1.0, 0.0, 4.0))


def test_uniform_weights_tell_nothing():
    assert information(UNIFORM) == pytest.approx(0.0)
    assert specialisation(UNIFORM) == pytest.approx(0.0)


def test_one_dead_expert():
    shares = {"a": 0.5, "b": 0.5, "c": 0.0}
    assert dead_experts(shares) == ["c"]
    found = imbalance(list(shares.values()))
    assert found.max_over_mean == pytest.approx(1.5)
    assert found.cv2 == pytest.approx(0.5)  # mean of (1.5 - 1)², (1.5 - 1)², (0 - 1)²
    assert found.effective == pytest.approx(2.0)
    assert information(ONE_DEAD) == pytest.approx(0.0)


def test_two_merged_tasks():
    # H(expert) = 1.5 bits, nothing is left open by the task
    assert information(MERGED) == pytest.approx(1.5)
    assert specialisation(MERGED) == pytest.approx(0.75)


def test_nothing_to_tell_apart():
    assert information([[1.0, 0.0]]) is None
    assert information([[1.0], [1.0]]) is None
    assert information([[0.5, -0.5], [1.0, 1.0]]) is None
    assert imbalance([0.0, 0.0]) == (1.0, 0.0, 2.0)


def test_a_gate_is_ruled_where_one_expert_is_first_for_nine_tenths():
    rows = [
        {"gate": gate, "expert": expert, "top1_share": share}
        for gate, shares in {"g0": (0.95, 0.05), "g1": (0.89, 0.11), "alone": (1.0,)}.items()
        for expert, share in zip("ab", shares, strict=False)
    ]
    assert ruled_gates(rows) == {"g0": "a"}


def test_agreement_of_layers():
    one, other = {"x": {"a": 0.9, "b": 0.1}}, {"x": {"a": 0.2, "b": 0.8}}
    assert agreement({"0": one, "1": one}) == 1.0
    assert agreement({"0": one, "1": one, "2": one, "3": other}) == 0.75
    assert agreement({}) is None


def test_drift():
    before = {"x": {"a": 1.0}, "y": {"a": 0.5, "b": 0.5}, "gone": {"a": 1.0}}
    after = {"x": {"b": 2.0}, "y": {"a": 0.25, "b": 0.5, "c": 0.25}, "new": {"a": 1.0}}
    assert drift(before, after) == pytest.approx({"x": 1.0, "y": 0.25})
    assert drift(before, before) == pytest.approx(dict.fromkeys(before, 0.0))


def test_wilsons_interval():
    # 95 % of 10 of 20, as tables give it
    assert wilson(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson(1.0, 200) == pytest.approx((0.98116, 1.0), abs=1e-4)
    assert all(math.isnan(value) for value in (*wilson(1.7, 10), *wilson(0.5, 0)))


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=2, max_size=6))
def test_bounds(weights):
    bits = information(weights)
    assert 0 <= bits <= math.log2(min(len(weights), 3)) + 1e-9
    assert 0 <= specialisation(weights) <= 1
    found = imbalance([sum(column) for column in zip(*weights, strict=True)])
    assert 1 <= found.max_over_mean <= 3 + 1e-9 and 1 - 1e-9 <= found.effective <= 3 + 1e-9

"""The numbers of an accuracy matrix against the formulas, by hand."""

from __future__ import annotations

import csv
import io

import pytest

from molora.evaluation.continual import AccuracyMatrix

HAND = AccuracyMatrix(
    ["a", "b", "c"], [0.1, 0.2, 0.3], [[0.9, 0.25, 0.2], [0.7, 0.8, 0.5], [0.8, 0.6, 0.7]]
)  # fmt: skip


def test_by_hand():
    assert HAND.average_accuracy() == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert HAND.learning_accuracy() == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert HAND.forgetting() == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    assert HAND.backward_transfer() == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)
    assert HAND.backward_transfer(over_all=True) == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 3)
    assert HAND.forward_transfer() == pytest.approx(((0.25 - 0.2) + (0.5 - 0.3)) / 2)


def test_forgetting_takes_the_best_there_ever_was():
    late = AccuracyMatrix(["a", "b", "c"], [], [[0.5, 0, 0], [0.9, 0.8, 0], [0.6, 0.8, 0.7]])
    assert late.forgetting() == pytest.approx((0.3 + 0.0) / 2)
    assert late.backward_transfer() == pytest.approx((0.1 + 0.0) / 2)
    assert late.forward_transfer() is None
    early = AccuracyMatrix(["a", "b", "c"], [], [[0.5, 0.9, 0], [0.5, 0.8, 0], [0.5, 0.8, 0.7]])
    assert early.forgetting() == pytest.approx((0.0 + 0.1) / 2)  # better before its own turn


def test_one_task_forgets_nothing_and_half_a_sequence_counts_what_it_saw():
    one = AccuracyMatrix(["a", "b"], [0.1, 0.1], [[0.9, 0.3]])
    assert (one.average_accuracy(), one.forgetting(), one.backward_transfer()) == (0.9, 0.0, 0.0)


def test_joint_training_has_an_average_only():
    joint = AccuracyMatrix(["a", "b"], [], [[0.9, 0.5]], joint=True)
    assert joint.summary() == {"AA": pytest.approx(0.7)}
    assert joint.turn_names == ["all tasks"]


def test_there_and_back_and_as_csv():
    again = AccuracyMatrix.from_dict(HAND.to_dict())
    assert again == HAND
    rows = list(csv.reader(io.StringIO(AccuracyMatrix(["a", "b"], [], [[0.5, None]]).to_csv())))
    assert rows == [["after", "a", "b"], ["a", "0.5", ""]]

"""What is odd about records, counted by hand."""

from __future__ import annotations

from array import array

import pytest

from molora.data.audit import Audit, Lengths, audit
from molora.data.prompts import Example
from molora.data.tasks import Task


def test_doubles_contradictions_and_leaks() -> None:
    rows = [("a", "1"), ("A ", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("c", "1"), ("c", "1")]
    held_out = [("a", "9"), ("B", "1"), ("new", "1")]
    task = Task("t", 0, *([{"prompt": p, "target": t} for p, t in part] for part in (rows, held_out)))
    found = audit(task)
    assert (found.doubles, found.contradictions, found.leaks) == (3, 1, 2)
    assert (found.train, found.eval, found.labels, found.majority) == (7, 3, {}, None)


def test_prompts_without_text() -> None:
    task = Task("t", 0, [{"prompt": p, "target": t} for p, t in ((" ", "1"), ("", "2"), ("a", "3"))], [])
    assert audit(task).empty == 2
    assert "2 of 3 training prompts are empty" in "\n".join(audit(task).lines())


def test_nothing_odd_is_nothing_said() -> None:
    task = Task("t", 0, [{"prompt": "a", "target": "b"}], [{"prompt": "c", "target": "b"}])
    assert list(audit(task).lines()) == []


def test_labels_and_the_majority() -> None:
    def rows(*labels: str) -> list[dict[str, str]]:
        return [{"text": f"{label} {i}", "label": label} for i, label in enumerate(labels)]

    task = Task(
        "t",
        0,
        rows(*"x" * 20, "y", "y"),
        rows("x", "y", "y", "x", "y"),
        kind="classification",
        labels=("y", "x", "z"),
    )
    found = audit(task)
    assert (found.labels, found.held_out) == ({"y": 2, "x": 20, "z": 0}, {"y": 3, "x": 2, "z": 0})
    assert found.majority == ("x", 0.4)  # of the training records: a guess may not look at what is held out
    assert "no training record has the label z" in list(found.lines())
    uneven = Audit("t", 22, 0, labels={"x": 20, "y": 2})
    assert any("uneven" in line for line in uneven.lines()) and uneven.majority is None


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([3, 4, 9, 17], "to 4: 50 %, to 8: 50 %, to 16: 75 %, to 32: 100 %"),
        ([1], "to 2: 100 %"),
        (
            [1, 5000],
            "to 256: 50 %, to 512: 50 %, to 1024: 50 %, to 2048: 50 %, to 4096: 50 %, to 8192: 100 %",
        ),
    ],
)
def test_a_histogram_of_lengths(tokens: list[int], said: str) -> None:
    assert Lengths(tokens, 0).histogram() == said


def test_lengths_are_those_before_anything_is_cut() -> None:
    causal = Example(array("i", [1, 2, 3]), array("i", [-100, 2, 3]), 1, 0, cut_prompt=4, cut_target=2)
    seq2seq = Example(array("i", [1, 2]), array("i", [5, 6, 7]), 2, 0, cut_target=9)  # of the other side
    label = Example(array("i", [1, 2, 3, 4]), 1, 4, 0, cut_prompt=1)
    found = Lengths.of([causal, seq2seq, label])
    assert (found.tokens, found.cut, found.at(0.5), found.at(1.0)) == ([2, 5, 9], 3, 5, 9)

"""What changed between two evaluations, and how sure that is: closed forms, and what cannot be compared."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import torch

from molora.errors import AdapterError
from molora.evaluation.paired import bootstrap, compare, mcnemar
from molora.evaluation.predictions import Prediction, examples, from_jsonl, to_jsonl


def made(rights: str, task: str = "t") -> list[Prediction]:
    """A prediction for each 1 (right) and 0 (wrong)."""
    return [
        Prediction(task, "gate", i, f"p{i}", "yes", "yes" if r == "1" else "no", r == "1", float(r))
        for i, r in enumerate(rights)
    ]


def losses(*values: float, count: int = 1) -> list[Prediction]:
    return [Prediction("t", "gate", i, f"p{i}", "a", None, None, v, count) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (7, 1, 2 * (1 + 8) / 256), (4, 4, 1.0)],
)
def test_mcnemar_is_the_binomial_tail(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_the_bootstrap_is_about_the_normal_interval() -> None:
    generator = torch.Generator().manual_seed(1)
    differences = torch.randn(400, generator=generator, dtype=torch.float64) + 0.5
    low, high = bootstrap(differences, torch.ones(400, dtype=torch.float64))
    error = 1.96 * float(differences.std()) / 20
    middle = float(differences.mean())
    assert (low, high) == (pytest.approx(middle - error, abs=0.02), pytest.approx(middle + error, abs=0.02))
    assert bootstrap(torch.full((9,), 0.25, dtype=torch.float64), torch.ones(9, dtype=torch.float64)) == (
        0.25,
        0.25,
    )


def test_what_changed_is_counted_and_shown() -> None:
    (row,), changed = compare(made("110010"), made("011011"))
    assert (row.count, row.gained, row.lost, row.p) == (6, 2, 1, 1.0)
    assert (row.before, row.after) == (3 / 6, 4 / 6)
    assert row.low <= row.after - row.before <= row.high
    assert [one.record for one, _ in changed] == [0, 2, 5]
    both_wrong = [replace(made("0")[0], prediction=said) for said in ("no", "perhaps")]
    assert len(compare(both_wrong[:1], both_wrong[1:])[1]) == 1  # another wrong answer is a change too


def test_a_loss_is_weighed_by_its_tokens() -> None:
    before, after = losses(1.0, 2.0), losses(1.5, 2.0)
    before[1], after[1] = replace(before[1], count=3), replace(after[1], count=3)
    (row,), changed = compare(before, after)
    assert (row.before, row.after, row.p) == (7 / 4, 7.5 / 4, None)
    assert len(changed) == 1


def test_only_the_same_records_are_compared() -> None:
    with pytest.raises(AdapterError, match="no task and mode in common"):
        compare(made("1", "a"), made("1", "b"))
    other = [replace(made("1")[0], prompt="another")]
    with pytest.raises(AdapterError, match="record 0 of task 't' is not the same in both"):
        compare(made("1"), other)
    rows, _ = compare(made("10"), made("1"))
    assert rows[0].count == 1


def test_predictions_survive_the_file(tmp_path: Path) -> None:
    found = [*made("10"), *losses(nan), replace(made("1")[0], experts={"e": 0.5}, prompt="ä\n", text="\0")]
    file = tmp_path / "p.jsonl"
    file.write_text(to_jsonl(found), encoding="utf-8")
    again = from_jsonl(file)
    assert again[:2] + again[3:] == found[:2] + found[3:] and again[2].score != again[2].score
    file.write_text('{"task": "t"}\n', encoding="utf-8")
    with pytest.raises(AdapterError, match="not a file of predictions"):
        from_jsonl(file)


def test_examples_are_some_right_and_some_wrong_ones_of_the_first_mode() -> None:
    found = [*made("0111101"), *[replace(p, mode="base") for p in made("0")], *losses(1.0)]
    chosen = examples(found, 2)
    assert [(p.record, p.right) for p in chosen["t"]] == [(1, True), (2, True), (0, False), (5, False)]

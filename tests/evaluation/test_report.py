"""Report: round trips, differences and thresholds."""

import csv
import io
import json
import math

import pytest

from molora.errors import AdapterError, ConfigError, ThresholdError
from molora.evaluation.report import Report, Score, check_thresholds, differences
from molora.evaluation.routing import RoutingSummary


@pytest.fixture
def report():
    return Report(
        scores=[
            Score("law", "gate", "exact_match", 0.75, 200),
            Score("news", "gate", "loss", 1.25, 100),
            Score("law", "base", "exact_match", 0.05, 200),
        ],
        routing=RoutingSummary("gate", 1234, {"law": {"a": 1.0, "b": 0.0}}, []),
        facts={"old_tasks_bit_equal": True},
        notes=["one, two"],
        environment={"torch": "2.13"},
    )


def test_json_round_trip(report):
    assert Report.from_json(report.to_json()) == report


def test_json_carries_derived_values_for_readers(report):
    plain = json.loads(report.to_json())
    assert plain["scores"][1]["perplexity"] == pytest.approx(math.exp(1.25))
    assert plain["dead_experts"] == []
    assert plain["specialisation"] is None  # one task: nothing to tell apart


def test_json_stays_strict_when_a_loss_is_not_finite(report):
    report.scores.append(Score("bad", "gate", "loss", math.nan, 3))
    text = report.to_json()
    assert "NaN" not in text
    assert math.isnan(Report.from_json(text).scores[-1].value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "scores": 3}'])
def test_what_is_not_a_report_is_an_adapter_error(text):
    with pytest.raises(AdapterError, match="report"):
        Report.from_json(text)


def test_csv_has_one_line_per_score(report):
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [r["task"] for r in rows] == ["law", "news", "law"]
    assert list(rows[0].items())[:4] == [
        ("task", "law"), ("mode", "gate"), ("metric", "exact_match"), ("value", "0.75"),
    ]  # fmt: skip


def test_csv_of_a_grown_run_has_both_stages(report):
    report.before = report.scores[:1]
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [r["stage"] for r in rows] == ["before", "after", "after", "after"]


def test_differences_pair_by_task_and_mode(report):
    before = [Score("law", "gate", "exact_match", 0.5, 200)]
    found = differences(before, report.scores)
    assert [(d.task, d.mode, d.change) for d in found] == [
        ("law", "gate", 0.25), ("news", "gate", None), ("law", "base", None),
    ]  # fmt: skip


def test_order_of_tasks_and_modes_is_kept(report):
    assert report.tasks == ["law", "news"]
    assert report.modes == ["gate", "base"]
    assert report.score("law", "base").value == 0.05
    with pytest.raises(KeyError):
        report.score("law", "task")


def test_threshold_met_or_missed(report):
    check_thresholds(report, {"*": 0.7})
    with pytest.raises(ThresholdError, match=r"law: exact_match 0\.7500 < 0\.8") as caught:
        check_thresholds(report, {"*": 0.8})
    assert caught.value.exit_code == 6
    with pytest.raises(ThresholdError):
        check_thresholds(report, {"*": 0.7}, mode="base")


def test_a_named_floor_beats_the_general_one(report):
    check_thresholds(report, {"*": 0.9, "law": 0.5})


def test_nan_misses_any_floor(report):
    report.scores[0] = Score("law", "gate", "exact_match", math.nan, 200)
    with pytest.raises(ThresholdError):
        check_thresholds(report, {"*": 0.0})


def test_floors_that_cannot_be_checked_are_config_errors(report):
    with pytest.raises(ConfigError, match="'lwa'"):
        check_thresholds(report, {"lwa": 0.5})
    with pytest.raises(ConfigError, match="has a loss"):
        check_thresholds(report, {"news": 0.5})

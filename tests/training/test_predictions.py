"""`molora eval --predictions` and `molora compare`: every record's answer agrees with the scores and the routing."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from molora.cli.main import main
from molora.errors import ConfigError
from molora.evaluation.predictions import PREDICTIONS_FILE, from_jsonl
from molora.store.runs import Run
from molora.training.evaluate import evaluate
from molora.training.train import train
from tests.training.runs import recipe_for
from tests.training.test_train import classification


@pytest.fixture(scope="module", params=["language model", "classifier", "loss"])
def run(
    request: pytest.FixtureRequest, base: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("predictions")
    recipe: dict[str, Any] = recipe_for(base, folder)
    if request.param == "classifier":
        recipe = classification(encoder, folder, folder / "letters.jsonl")
    if request.param == "loss":
        for task in recipe["data"]["tasks"].values():
            task["metric"] = "loss"
    recipe["train"]["max_steps"] = 2
    recipe["eval"] = {"batch_size": 3, "max_new_tokens": 3, "modes": ["gate", "base"]}
    return train(recipe)


def test_every_answer_is_written_and_agrees_with_the_report(run: Run) -> None:
    report = evaluate(run, predictions=True)
    assert report.folder is not None and report.routing is not None
    found = from_jsonl(report.folder / PREDICTIONS_FILE)
    assert found == report.predictions
    for score in report.scores:
        same = [p for p in found if (p.task, p.mode) == (score.task, score.mode)]
        assert [p.record for p in same] == list(range(score.count))
        total = sum(p.count for p in same)
        assert sum(p.score * p.count for p in same) / total == pytest.approx(score.value)
        assert all((p.right is None) == (score.metric == "loss") for p in same)
    assert all(p.experts is None for p in found if p.mode == "base")
    for p in found:
        if p.mode == "gate":
            assert p.experts is not None and sum(p.experts.values()) == pytest.approx(1.0, abs=1e-5)
    if run.config.base.task_type == "SEQ_CLS":
        assert {p.prediction for p in found} <= {"a", "b", "c"} and {p.answer for p in found} == {
            "a",
            "b",
            "c",
        }
    if run.config.base.task_type == "SEQ_CLS" or report.scores[0].metric == "loss":
        return
    # Records with as many tokens weigh alike, so that their mean is what the report says of the task.
    by_task: dict[str, list[float]] = defaultdict(list)
    for p in found:
        if p.experts is not None:
            by_task[p.task].append(p.experts["expert_0"])
    for task, weights in by_task.items():
        assert fmean(weights) == pytest.approx(report.routing.by_task[task]["expert_0"], abs=0.02)


def test_two_evaluations_are_compared_on_the_command_line(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(
        2
    ):  # a classifier's own head is trained with the adapter: without it, it is another one each time
        evaluate(run, predictions=True, modes=["gate"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["compare", str(run.evaluations / "1"), str(run.path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and told["changed"] == []
    assert all(row["before"] == row["after"] and row["low"] == row["high"] == 0 for row in told["tasks"])
    with pytest.raises(SystemExit) as end:
        main(["compare", str(run.path), str(run.path)])
    assert end.value.code == 0 and "gate alone" in capsys.readouterr().out
    if run.config.base.task_type == "SEQ_CLS":
        with pytest.raises(SystemExit):
            main(["eval", str(run.path), "--examples", "1", "--predictions"])
        out = capsys.readouterr().out
        assert "letters, gate alone, " in out and "predictions: " in out


def test_an_adapter_has_no_folder_for_predictions(run: Run) -> None:
    with pytest.raises(ConfigError, match="predictions need a folder"):
        evaluate(run.adapter, recipe=run.config, predictions=True)

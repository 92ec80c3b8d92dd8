"""`molora search`: the recipe comes first, hopeless trials end early, size costs, and a killed search goes on."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from molora.config.load import load_recipe
from molora.config.search_space import Range
from molora.errors import ConfigError, DivergedError
from molora.training import search
from molora.training.journal import open_study
from molora.training.search import Search
from tests.training.runs import ROOT, recipe_for

pytest.importorskip("optuna", reason="needs optuna: pip install molora[search]")
SPACE = {"adapter.r": [2, 4, 8], "train.lr": Range(0.001, 0.1, log=True)}


def found(base: Path, folder: Path, trials: int = 3, r: int = 2, **settings: Any) -> Search:
    config = load_recipe(recipe_for(base, folder, max_steps=4), [f"adapter.r={r}"])
    return Search(config, SPACE, folder / "search", trials, **settings)


def scored(monkeypatch: pytest.MonkeyPatch, reports: bool = False) -> None:
    """Training stood in for: a score by rank, and losses for the pruner."""

    def trained(self: Search, trial: Any, config: Any) -> tuple[float, int]:
        r = config.adapter.r
        if config.train.lr > 0.05:
            raise DivergedError("the training loss is nan at step 3.")
        if reports:
            trial.report(-float(trial.number), 1)
            if trial.should_prune():
                raise search.optuna_module().TrialPruned
        return {2: 0.90, 4: 0.98, 8: 0.985}[r], 1000 * r

    monkeypatch.setattr(Search, "_trained", trained)
    monkeypatch.setattr(search, "_numbers", lambda model: 2000)


def test_a_trial_is_worth_its_score_less_what_its_size_costs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch)
    one = found(base, tmp_path, trials=9, r=8)
    tried = one.run()
    first = sorted(tried, key=lambda trial: trial.number)[:3]  # the recipe's own, and with smaller ranks
    assert len(tried) == 9
    assert [trial.values for trial in first] == [{"adapter.r": r, "train.lr": 0.01} for r in (8, 4, 2)]
    for trial in tried:
        if trial.value is None:
            assert trial.state == "the training loss is nan at step 3."
            continue
        r = trial.values["adapter.r"]
        assert trial.value == {2: 0.90, 4: 0.98, 8: 0.985}[r] - 0.01 * math.log2(r / 2)
    assert tried[0].values["adapter.r"] == 4  # 0.98 - 0.01 is more than 0.985 - 0.02
    assert load_recipe(one.folder / "best.yaml").adapter.r == 4
    with (one.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == [trial.number for trial in tried]
    assert json.loads(rows[0]["adapter.r"]) == 4


def test_a_trial_that_is_worse_than_the_median_ends(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, reports=True)
    one = found(base, tmp_path, trials=8)
    one.run()
    states = {trial.number: trial.state for trial in one.tried() if trial.state in ("complete", "pruned")}
    assert {states[n] for n in states if n < 4} == {"complete"} and "pruned" in states.values()


def test_a_killed_trial_is_tried_again_and_no_proposal_comes_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch)
    one = found(base, tmp_path, trials=2)
    one.run()
    study = open_study(one.folder / "journal.log", 0, 4)
    running = study.ask()
    params = {"adapter.r": running.suggest_categorical("adapter.r", [json.dumps(r) for r in (2, 4, 8)])}
    with (one.folder / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 6, "half a li')
    more = found(base, tmp_path, trials=6)
    tried = more.run(resume=True)
    assert [trial.number for trial in sorted(tried, key=lambda t: t.number)] == [0, 1, 3, 4, 5, 6]
    again = next(trial for trial in tried if trial.number == 3)
    assert json.dumps(again.values["adapter.r"]) == params["adapter.r"]
    rates = [trial.values["train.lr"] for trial in tried]
    assert len(set(rates)) == 6


def test_what_cannot_be_searched_is_refused_before_anything_is_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch)
    with pytest.raises(ConfigError, match="has no search to go on with"):
        found(base, tmp_path).run(resume=True)
    found(base, tmp_path, trials=1).run()
    with pytest.raises(ConfigError, match="is there already"):
        found(base, tmp_path).run()
    with pytest.raises(ConfigError, match="was started with another cost"):
        found(base, tmp_path, cost=0.5).run(resume=True)
    recipe = recipe_for(base, tmp_path / "other")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "target": "b"}\n')
    recipe["data"]["tasks"] = {"only": {"source": "jsonl", "train": str(data)}}
    with pytest.raises(ConfigError, match="these tasks have none: only"):
        Search(load_recipe(recipe), SPACE, tmp_path / "other").run()
    rounds = {**recipe_for(base, tmp_path), "continual": {"strategy": "replay"}}
    with pytest.raises(
        ConfigError, match="a trial is one training; take out the recipe's `continual` section"
    ):
        Search(load_recipe(rounds), {"adapter.r": [1, 2]}, tmp_path / "rounds").run()
    staged = load_recipe(Path(__file__).parents[2] / "recipes" / "stages.yaml")
    with pytest.raises(ConfigError, match="take out the recipe's `stages` section"):
        Search(staged, {"adapter.r": [1, 2]}, tmp_path / "stages").run()
    with pytest.raises(ConfigError, match=r"the search names 'adapter\.rr'"):
        Search(load_recipe(recipe_for(base, tmp_path)), {"adapter.rr": [1]}, tmp_path / "third").run()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="needs the package optuna") as raised:
        found(base, tmp_path / "new").run()
    assert "molora[search]" in str(raised.value.hint) and not (tmp_path / "new" / "search").exists()


def test_a_trial_trains_in_memory_and_is_scored(base: Path, tmp_path: Path) -> None:
    one = found(base, tmp_path, trials=1)
    (trial,) = one.run()
    by_layer = 3 * 2 * (4 * 64 + 3 * 96) + 3 * (
        3 * 32 + 64
    )  # experts of rank 2; gates of q/k/v, o, gate/up, and down
    assert trial.state == "complete" and trial.parameters == 2 * by_layer and 0 <= (trial.score or 0.0) <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"search"}


def test_a_training_is_cut_short_at_a_quarter_of_its_steps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda self: True)
    reported: list[tuple[float, int]] = []
    monkeypatch.setattr("optuna.trial.Trial.report", lambda self, value, step: reported.append((value, step)))
    (trial,) = found(base, tmp_path, trials=1).run()
    assert trial.state == "pruned" and trial.value is None
    assert [step for _, step in reported] == [1] and reported[0][0] < 0  # less loss is more


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_in_a_new_process(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(base, tmp_path / "runs", max_steps=4)))
    command = [
        sys.executable,
        "-m",
        "molora.cli.main",
        "search",
        str(recipe),
        "--trials",
        "3",
        "--out",
        str(tmp_path / "s"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while not (tmp_path / "s" / "trials.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # in the middle of the second trial
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len((tmp_path / "s" / "trials.csv").read_text().splitlines()) - 1
    assert 1 <= done < 3
    subprocess.run(
        [*command, "--resume"], cwd=ROOT, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    with (tmp_path / "s" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {row["state"] for row in rows} <= {"complete", "pruned"}

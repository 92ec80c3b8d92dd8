"""A model built in stages: what each leaves, a resume that changes nothing, weights that fall, what a recipe may not say."""

from __future__ import annotations

import csv
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.cli.main import _run
from molora.config import load_recipe
from molora.config.stages import ExpertStage
from molora.continual import turns
from molora.continual.grow import add_expert
from molora.continual.staged import Staged, stage_weights
from molora.continual.strategy import Turn
from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.fusion.sources import read_sources
from molora.store.adapter import read_config
from molora.store.runs import Run
from molora.training.preferences import as_before, log_probs
from tests.training.runs import adapter_weights, assert_same_weights, write_base
from tests.training.test_preferences import pairs_for
from tests.zoo import molora_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def recipe(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Two tasks that answer one letter, then preferences between two letters; older experts fade from stage to stage."""
    made = {"source": "synthetic", "train_size": 24, "eval_size": 4}
    tasks = {name: {**made, "generator": name, "target": name[0]} for name in ("pig", "mirror", "zigzag")}
    tasks["zigzag"] |= {"target": "z", "rejected": "p"}
    return {
        "name": "staged", "base": str(base), "output": str(output), "adapter": {"r": 2, "lora_alpha": 4},
        "data": {"max_length": 48, "tasks": tasks}, "eval": {"batch_size": 8, "max_new_tokens": 2},
        "train": {"max_steps": 6, "batch_size": 8, "lr": 5e-2, "log_every": 1},
        "stages": [
            {"name": "general", "tasks": ["pig"]},
            {"name": "domain", "tasks": ["mirror"], "gamma": 0.5, "train": {"max_steps": 8}},
            {"name": "manner", "tasks": ["zigzag"], "gamma": 0.5, "train": {"objective": "dpo"}},
        ],
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return molora.train_stages(recipe(base, tmp_path_factory.mktemp("whole")))


def stage(run: Run, number: int) -> Path:
    return sorted((run.path / "stages").iterdir())[number - 1]


WEIGHTS = {
    "pig": {"general": 1.0},
    "mirror": {"general": 0.5, "domain": 1.0},
    "zigzag": {"general": 0.25, "domain": 0.5, "manner": 1.0},
}


def test_each_stage_is_a_run_and_earlier_ones_stay_as_they_were(whole: Run) -> None:
    assert [path.name for path in sorted((whole.path / "stages").iterdir())] == [
        "01-general", "02-domain", "03-manner",
    ]  # fmt: skip
    found = json.loads((whole.path / "stages.json").read_text())
    assert found["unchanged"] == dict.fromkeys(WEIGHTS, True)
    rows = found["scores"]["rows"]
    assert rows[0][0] == 1 and rows[1][:2] == [1, 1] and rows[2][:2] == [1, 1]
    lines = (whole.path / "stages.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["after", "base", "general", "domain", "manner"]
    assert (whole.path / "stages.png").is_file()
    config = read_config(whole.adapter)
    assert config.tasks == WEIGHTS and config.frozen_experts == ["general", "domain"]
    for number, count in ((1, 1), (2, 2), (3, 3)):
        one = molora.load_run(stage(whole, number))
        assert one.config.stages is None and one.config.adapter.num_experts == count
        assert one.config.train.max_steps == (8 if number == 2 else 6)
    first, last = adapter_weights(stage(whole, 1) / "adapter"), adapter_weights(whole.adapter)
    assert all(torch.equal(last[key][:1], tensor) for key, tensor in first.items())


def test_its_report_is_of_the_whole_and_it_is_a_run_like_any_other(whole: Run) -> None:
    assert whole.report is not None and {row["task"] for row in whole.report["scores"]} == set(WEIGHTS)
    report = molora.evaluate(whole, tasks=["pig"], modes=["task"])
    assert report.score("pig", "task").value == 1
    (source,) = read_sources({"all": whole.path}, tasks={"all": "zigzag"})
    assert {len(A) for A, _ in source.lora.factors.values()} == {6}  # three experts of rank 2, weighed


def test_preferences_are_measured_from_the_stage_before(whole: Run) -> None:
    with (stage(whole, 3) / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("rewards/margins")]
    margins = [float(row["rewards/margins"]) for row in rows]
    # The new expert starts at nothing, but the first step is at weights that have begun to fall: not quite 0.
    assert abs(margins[0]) < 0.2 and margins[-1] > margins[0] + 0.1


def test_a_resumed_run_is_the_uninterrupted_one(
    base: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = recipe(base, tmp_path)
    broken["train"]["save_every"] = 2
    real, calls = Staged.at_step, []

    def crash(self: Staged, model: Any, step: int, steps: int) -> None:
        calls.append(step)
        if len(calls) in (6 + 6, 6 + 6 + 5):  # in the second stage, then in the third, after checkpoints
            raise KeyError("crash")
        real(self, model, step, steps)

    with monkeypatch.context() as patched:
        patched.setattr(Staged, "at_step", crash)
        for resume in (None, True):
            with pytest.raises(KeyError, match="crash"):
                molora.train_stages(broken, resume=resume)
    resumed = molora.train_stages(broken, resume=True)
    assert_same_weights(resumed.adapter, whole.adapter)
    assert (resumed.path / "stages.json").read_bytes() == (whole.path / "stages.json").read_bytes()
    with pytest.raises(ConfigError, match="other settings: stages"):
        molora.train_stages(
            {**broken, "stages": [*broken["stages"][:2], {**broken["stages"][2], "gamma": 0.9}]}, resume=True
        )


@pytest.mark.slow
def test_a_crash_between_stages_changes_nothing_either(
    base: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyError("crash")

    with monkeypatch.context() as patched:
        patched.setattr(turns, "score_turn", crash)
        with pytest.raises(KeyError, match="crash"):
            molora.train_stages(recipe(base, tmp_path))
    assert_same_weights(molora.train_stages(recipe(base, tmp_path), resume=True).adapter, whole.adapter)


def test_a_staged_run_grows_by_hand_with_its_weights(whole: Run) -> None:
    task = {"name": "back", "source": "synthetic", "generator": "back", "train_size": 8, "eval_size": 4}
    grown = add_expert(whole, {"task": task, "train": {"max_steps": 1}})
    assert {name: read_config(grown.adapter).tasks[name] for name in WEIGHTS} == WEIGHTS
    assert grown.report is not None
    assert grown.report["facts"]["old tasks bit-equal with task ids given"] is True


# -- weights ------------------------------------------------------------------------------------------


def stages_of(*gammas: float) -> list[ExpertStage]:
    names = ("expert_0", "expert_1", "late")
    return [ExpertStage(name=n, tasks=[n], gamma=g) for n, g in zip(names, gammas, strict=True)]


def test_weights_are_powers_of_gamma() -> None:
    assert stage_weights(stages_of(1.0, 0.5, 0.5))[-1] == {"expert_0": 0.25, "expert_1": 0.5, "late": 1.0}
    assert stage_weights(stages_of(1.0, 1.0, 1.0))[-1] == {"expert_0": 1.0, "expert_1": 1.0, "late": 1.0}


def test_weights_fall_evenly_and_the_reference_does_not_move() -> None:
    model = molora_model("llama", "task-group", num_experts=2, tasks={"a": ["expert_0"]})
    before = deepcopy(model)
    before.weigh_tasks({"a": {"expert_0": 1.0, "expert_1": 1.0}})
    model.add_expert("late", tasks=["late"])
    strategy = Staged(stages_of(1.0, 1.0, 0.5))
    task = Task("late", model.task_ids["late"], train=[{"prompt": "a", "target": "b"}])
    turn = Turn(0, [task])
    strategy.before_task(model, turn)
    batch = pairs_for()
    batch["routing_task_ids"] = torch.full((4,), model.task_ids["late"])
    with torch.no_grad():
        want = log_probs(before, {**batch, "routing_task_ids": torch.full((4,), before.task_ids["a"])})
    for step, share in ((0, 0.9), (2, 0.7), (4, 0.5)):
        strategy.at_step(model, step, 5)
        assert model.tasks["late"] == pytest.approx({"expert_0": share, "expert_1": share, "late": 1.0})
        with torch.no_grad(), strategy.as_it_was(model), as_before(model, batch) as given:
            torch.testing.assert_close(log_probs(model, given), want, rtol=0, atol=2e-5)
        with torch.no_grad(), as_before(model, batch) as given:
            assert (log_probs(model, given) - want).abs().max() > 1e-3
    strategy.after_task(model, turn)
    assert strategy.changes_weights and model.tasks["late"]["expert_0"] == 0.5


def test_what_weights_of_tasks_may_be() -> None:
    model = molora_model("llama", "task-group", num_experts=2, tasks={"a": ["expert_0"]})
    for tasks, words in (
        ({"b": {"expert_0": 1.0}}, "no task 'b'"),
        ({"a": {}}, "names no expert"),
        ({"a": {"expert_9": 1.0}}, "no expert 'expert_9'"),
        ({"a": {"expert_0": 0.0}}, "positive numbers"),
    ):
        known = next(iter(model.task_ids))
        with pytest.raises(ConfigError, match=words):
            model.weigh_tasks({known if name == "a" else name: share for name, share in tasks.items()})


# -- recipes ------------------------------------------------------------------------------------------


def test_a_resolved_recipe_means_the_same(base: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe(base, tmp_path))
    assert load_recipe(config.model_dump(mode="json")) == config
    assert config.stages is not None and config.stages[1].train.lr == 5e-2


TWO = [{"name": "a", "tasks": ["pig", "mirror"]}, {"name": "zigzag"}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"continual": {"strategy": "color"}}, r"stages: does not go with `continual`"),
        ({"adapter": {"gate": "soft"}}, "leave the gate out"),
        ({"adapter": {"num_experts": 2}}, "each stage adds one"),
        ({"adapter": {"tasks": {"pig": ["expert_0"]}}}, "is the stages' to say"),
        ({"adapter": {"from_loras": {"a": "a"}}}, "whose experts are new"),
        ({"stages": TWO[:1]}, "no stage trains on zigzag"),
        ({"stages": [*TWO, {"name": "b", "tasks": ["pig"]}]}, "learned in stage 'a' already"),
        ({"stages": [*TWO, {"name": "A", "tasks": ["pig"]}]}, "is there twice"),
        ({"stages": [TWO[0], {"name": "zigag"}]}, "Did you mean 'zigzag'"),
        ({"stages": [{**TWO[0], "gamma": 0.5}, TWO[1]]}, "the first has none"),
        ({"stages": [{**TWO[0], "init": "copy:zigzag"}, TWO[1]]}, "is not a start"),
        ({"stages": [TWO[0], {**TWO[1], "gamma": 0.5, "train": {"patience": 2, "val_every": 1}}]}, "write only one"),
        ({"stages": [TWO[0], {**TWO[1], "train": {"devices": 2}}]}, "one device"),
        ({"stages": [TWO[0], {**TWO[1], "gama": 0.5}]}, "Did you mean 'gamma'"),
        ({"stages": []}, "must not be empty"),
    ],
    ids=str,
)  # fmt: skip
def test_what_contradicts_stages(base: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(recipe(base, tmp_path, **changes))


def test_what_a_later_stage_would_stumble_over_is_said_first(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    broken = recipe(base, tmp_path / "runs")
    del broken["data"]["tasks"]["zigzag"]["rejected"]
    with pytest.raises(ConfigError, match="zigzag: has no rejected answers"):
        molora.train_stages(broken)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="molora train RECIPE"):
        molora.train(recipe(base, tmp_path / "runs"))
    file.write_text(json.dumps(broken))
    assert _run(["validate", str(file)]) == 2
    file.write_text(json.dumps(recipe(base, tmp_path / "runs")))
    assert _run(["validate", str(file)]) == 0

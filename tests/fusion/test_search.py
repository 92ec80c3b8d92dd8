"""Weights that are found: what is measured is the fused LoRA's own loss, and the best of what was tried is what comes out."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import molora
from molora.data.tasks import Task, TaskSet
from molora.errors import AdapterError, ConfigError, DataError
from molora.fusion.search import held_out, mean_loss, summed
from molora.fusion.searchers import lorahub_score, simplex
from molora.fusion.sources import read_sources
from tests.cli.conftest import Cli, cli  # noqa: F401  (a fixture)
from tests.training.runs import recipe_for, write_base
from tests.zoo import base_model

Place = tuple[Any, Any, dict[str, Path], TaskSet]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A base, its tokenizer, two LoRAs that differ in everything, and two tasks."""
    root = tmp_path_factory.mktemp("search")
    write_base(root / "base")
    folders = {}
    for i, name in enumerate("ab"):
        targets = ["q_proj", ("up_proj", "v_proj")[i]]
        lora = LoraConfig(r=2 + i, use_rslora=bool(i), target_modules=targets, init_lora_weights=False)
        torch.manual_seed(i)
        get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), lora).save_pretrained(root / name)
        folders[name] = root / name
    rows = [{"prompt": f"{i}+1=", "target": str(i + 1)} for i in range(12)]
    tasks = TaskSet.of(Task("sums", 0, train=rows, eval=rows), Task("more", 1, train=rows, eval=rows[:3]))
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    return base, AutoTokenizer.from_pretrained(root / "base"), folders, tasks


def test_the_simplex_is_whole() -> None:
    assert simplex(2, 0.25) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    points = simplex(3, 0.1)
    assert len(points) == len(set(points)) == 66 and all(abs(sum(p) - 1) < 1e-9 for p in points)


@pytest.mark.parametrize(
    ("count", "step", "words"),
    [(2, 0.3, "step is 0.3"), (2, 0.0, "step is 0.0"), (8, 0.1, "has 19,448 points")],
)
def test_a_grid_that_is_none(count: int, step: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simplex(count, step)


def test_the_score_is_the_releases() -> None:
    """default_l1_regularization and get_score of the release."""
    weights = [0.5, -1.5, 0.25]
    assert lorahub_score(2.0, weights) == pytest.approx(
        2.0 + 0.05 * (sum(abs(x) for x in weights) / len(weights))
    )


def test_what_is_measured_is_the_fused_lora(place: Place, tmp_path: Path) -> None:
    base, tokenizer, folders, tasks = place
    weights = {"a": 0.8, "b": -0.3}
    batches = held_out(tasks, tokenizer, 100, 64, 5, 0)
    with summed(base, read_sources(folders)) as weigh:
        weigh([*weights.values()])
        found = mean_loss(base, batches)
        weigh([0.0, 0.0])
        assert mean_loss(base, batches) == pytest.approx(alone := mean_loss(base, batches))
    assert mean_loss(base, batches) == alone and not any(m._forward_hooks for m in base.modules())
    done = molora.fuse(base, folders, weights=weights, out=tmp_path / "f")
    fresh = AutoModelForCausalLM.from_pretrained(base.config._name_or_path)
    fused = PeftModel.from_pretrained(fresh, done.path).eval()
    assert found == pytest.approx(mean_loss(fused.get_base_model(), batches), abs=1e-5)
    # By hand, one record at a time: the mean of each task, and of both.
    means = []
    for task in tasks:
        nats = []
        for row in task.eval:
            prompt, answer = (
                tokenizer(row["prompt"]).input_ids,
                [*tokenizer(row["target"]).input_ids, tokenizer.eos_token_id],
            )
            with torch.no_grad():
                logs = fused(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            nats += [-float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        means.append(sum(nats) / len(nats))
    assert_close(found, sum(means) / 2, rtol=0, atol=1e-4)


def test_a_grid_finds_the_best_of_its_points(place: Place) -> None:
    found = molora.find_weights(*place, search="grid", step=0.25)
    assert len(found.trials) == 5 and found.best.loss == min(t.loss for t in found.trials)
    assert tuple(found.weights.values()) == found.best.weights
    assert (
        found.equal.loss == pytest.approx(found.trials[2].loss) and found.best.loss <= found.equal.loss + 1e-9
    )
    rows = [*csv.DictReader(io.StringIO(found.to_csv()))]
    assert [row["a"] for row in rows] == ["1", "0.75", "0.5", "0.25", "0"] and rows[4]["step"] == "4"
    assert molora.find_weights(*place, search="grid", step=0.25) == found


def test_lorahub_starts_at_nothing_and_stays_in_bounds(place: Place) -> None:
    pytest.importorskip("nevergrad", reason="needs nevergrad: pip install molora[lorahub]")
    found = molora.find_weights(*place, search="lorahub", trials=12)
    assert len(found.trials) == 12 and found.trials[0].weights == (0.0, 0.0)
    assert all(abs(w) <= 1.5 for trial in found.trials for w in trial.weights)
    assert all(t.score == pytest.approx(lorahub_score(t.loss, t.weights)) for t in found.trials)
    assert found.best.score <= found.trials[0].score and found.weights["a"] == found.best.weights[0]
    assert molora.find_weights(*place, search="lorahub", trials=12) == found


def test_optuna_starts_at_equal_weights_and_stays_in_bounds(place: Place) -> None:
    pytest.importorskip("optuna", reason="needs optuna: pip install molora[search]")
    found = molora.find_weights(*place, search="optuna", trials=12)
    assert len(found.trials) == 12 and found.trials[0].weights == (0.5, 0.5)
    assert all(abs(w) <= 1.5 for trial in found.trials for w in trial.weights)
    assert len({trial.weights for trial in found.trials}) == 12
    assert found.best.loss <= found.equal.loss == pytest.approx(found.trials[0].loss)
    assert molora.find_weights(*place, search="optuna", trials=12) == found


def test_what_cannot_be_searched(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer, folders, tasks = place
    with pytest.raises(ConfigError, match="Did you mean 'grid'"):
        molora.find_weights(*place, search="gird")
    with pytest.raises(ConfigError, match="records is 0; give at least 1"):
        molora.find_weights(*place, search="grid", records=0)
    with pytest.raises(DataError, match="task 'empty' has no held-out records"):
        molora.find_weights(base, tokenizer, folders, TaskSet.of(Task("empty", 0, train=[{}])), search="grid")
    with pytest.raises(AdapterError, match="does not fit this base"):
        molora.find_weights(base_model("gpt2"), tokenizer, folders, tasks, search="grid")
    for search, package, extra in (("lorahub", "nevergrad", "lorahub"), ("optuna", "optuna", "search")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ConfigError, match=rf"molora\[{extra}\]"):
            molora.find_weights(*place, search=search)


def test_the_verb(place: Place, tmp_path: Path, cli: Cli) -> None:  # noqa: F811
    import yaml

    base, _, folders, _ = place
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(base.config._name_or_path, tmp_path / "runs")))
    given = [
        "fuse",
        *(f"{name}={path}" for name, path in folders.items()),
        "--out",
        tmp_path / "f",
        "--search",
        "grid",
    ]
    done = cli(*given, "--recipe", recipe, "--step", "0.5", "--table", tmp_path / "t.csv")
    assert done.code == 0 and "best of 3 trials: a=" in done.out and "equal weights: loss" in done.out, (
        done.err
    )
    assert (tmp_path / "t.csv").read_text().startswith("step,a,b,loss,score\n0,1,0,")
    assert (tmp_path / "t.png").stat().st_size > 0 and (
        tmp_path / "f" / "adapter_model.safetensors"
    ).is_file()
    for more, words in (
        ([], "needs --recipe"),
        (["--recipe", recipe, "--method", "ties"], "is none"),
        (["--recipe", recipe, "--weight", "a=1", "--weight", "b=1"], "both say"),
    ):
        refused = cli(*given, *more)
        assert refused.code == 2 and words in refused.err

"""`molora merge`: a plain model with the very logits of the mixture; `molora merge-experts`: one expert instead of several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import molora
from molora.disk.manifest import verify_folder
from molora.models.build import load_trained
from molora.store.runs import Run
from molora.training.train import train
from tests.cli.conftest import Cli
from tests.training.runs import recipe_for, write_base


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task-routed run of two tasks."""
    folder = tmp_path_factory.mktemp("merge")
    write_base(folder / "base")
    recipe = recipe_for(folder / "base", folder / "runs", max_steps=2, lr=0.1)
    recipe["adapter"] = {"num_experts": 2, "r": 2, "gate": "task"}
    recipe["eval"]["modes"] = ["task"]
    return train(recipe).path


@pytest.mark.parametrize(
    ("given", "task"), [(["--task", "copy"], "copy"), (["--expert", "expert_1"], "reverse")]
)
def test_the_merged_model_answers_as_the_mixture(
    cli: Cli, run: Path, tmp_path: Path, given: list[str], task: str
) -> None:
    result = cli("merge", str(run), *given, "--out", str(tmp_path / "model"))
    assert result.code == 0 and result.out == f"model: {tmp_path / 'model'}\n", result.err
    verify_folder(tmp_path / "model")
    model, tokenizer, _ = load_trained(run, device="cpu")
    inputs = tokenizer(["copy(ab)=", "reverse(abc)="], return_tensors="pt", padding=True)
    with torch.no_grad(), molora.routing(model, task):
        expected = model(**inputs).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    same = AutoTokenizer.from_pretrained(tmp_path / "model")(
        ["copy(ab)=", "reverse(abc)="], return_tensors="pt", padding=True
    )
    assert torch.equal(same["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, expected, atol=1e-5)


@pytest.mark.slow
def test_it_loads_without_molora(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert cli("merge", str(run), "--task", "copy", "--out", str(tmp_path / "model")).code == 0
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"A.from_pretrained({str(tmp_path / 'model')!r}); assert not any(m.startswith('molora') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--task", "copy", "--expert", "expert_0"], "both say what is merged"),
        (["--expert", "expert_0=half"], "is not NAME or NAME=WEIGHT"),
        (["--expert", "expert_0=nan"], "not finite"),
        (["--expert", "expert_0=1", "--expert", "expert_0=2"], "twice"),
        (["--task", "cpy"], "cpy"),
        (["--expert", "expert_9"], "expert_9"),
        ([], "hint: say what is merged: --expert NAME=WEIGHT"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_writes_nothing(
    cli: Cli, run: Path, tmp_path: Path, given: list[str], words: str
) -> None:
    result = cli("merge", str(run), *given, "--out", str(tmp_path / "model"))
    assert result.code == 2 and words in result.err, result.err
    assert not (tmp_path / "model").exists()


def test_the_run_is_never_replaced(cli: Cli, run: Path) -> None:
    for out in (run, run / "adapter", run.parent):
        result = cli("merge", str(run), "--task", "copy", "--out", str(out))
        assert result.code == 2 and "the source" in result.err


def test_an_adapter_that_no_choice_makes_mergeable_says_why(cli: Cli, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    recipe = recipe_for(tmp_path / "base", tmp_path / "runs", max_steps=1)
    recipe["adapter"] = {"num_experts": 2, "r": 2, "gate": "task", "num_virtual_tokens": 2}
    recipe["eval"]["modes"] = ["task"]
    result = cli("merge", str(train(recipe).path), "--out", str(tmp_path / "model"))
    assert result.code == 2 and "virtual tokens" in result.err and "--expert" not in result.err, result.err


def test_merged_experts_serve_the_tasks_of_both_in_a_run_of_their_own(cli: Cli, run: Path) -> None:
    model, tokenizer, _ = load_trained(run, device="cpu")
    inputs = tokenizer(["copy(ab)=", "reverse(abc)="], return_tensors="pt", padding=True)
    with torch.no_grad(), molora.routing(model, experts={"expert_0": 0.75, "expert_1": 0.25}):
        expected = model(**inputs).logits
    result = cli("merge-experts", str(run), "expert_0=3", "expert_1", "--into", "both", "--rank", "4")
    assert result.code == 0 and "expert_0, expert_1 into both" in result.out, result.err
    made = Run.find(run.parents[1] / "small-both")
    assert made.config.adapter.tasks == {"copy": ["both"], "reverse": ["both"]}
    assert {row["task"] for row in made.report["before"]} == {"copy", "reverse"}
    assert len(made.report["scores"]) == len(made.report["before"])
    again, _, _ = load_trained(made.path, device="cpu")
    for task in ("copy", "reverse"):
        with torch.no_grad(), molora.routing(again, task):
            assert torch.allclose(again(**inputs).logits, expected, atol=1e-5)
    assert cli("eval", str(made.path)).code == 0  # it is a run like any other
    made = sorted(run.parents[1].iterdir())
    for bad, words in (
        (["expert_0", "--into", "x"], "two or more"),
        (["a=1", "a", "--into", "x"], "'a' twice"),
    ):
        result = cli("merge-experts", str(run), *bad)
        assert result.code == 2 and words in result.err, result.err
    assert sorted(run.parents[1].iterdir()) == made

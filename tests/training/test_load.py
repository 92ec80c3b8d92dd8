"""molora.load of a run or an adapter, in one line; and a run as it was after one of its steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import molora
from molora.errors import AdapterError, ConfigError
from molora.models.base import load_base
from molora.store.runs import Run
from molora.training.evaluate import evaluate
from molora.training.train import train
from tests.training.runs import recipe_for
from tests.training.test_train import classification


@pytest.fixture(scope="module", params=["language model", "classifier"])
def run(
    request: pytest.FixtureRequest, base: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Four steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("load")
    recipe = recipe_for(base, folder)
    if request.param == "classifier":
        recipe = classification(encoder, folder, folder / "letters.jsonl")
    recipe["train"] |= {"max_steps": 4, "save_every": 2}
    return train(recipe)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def same(model: Any, file: Path) -> bool:
    ours, theirs = weights(model), load_file(file / "adapter_model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_line_gives_model_and_tokenizer(run: Run) -> None:
    model, tokenizer = molora.load(run.path.parent)
    assert same(model, run.adapter) and not model.training
    by_hand = molora.load(load_base(run.config.base, 3)[0], run.adapter)
    batch = tokenizer(["copy(ab)="], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, by_hand(**batch).logits)
    from_adapter = molora.load(run.adapter)
    assert same(from_adapter.model, run.adapter)
    assert type(from_adapter.tokenizer) is type(tokenizer)


def test_the_run_after_one_of_its_steps(run: Run, tmp_path: Path) -> None:
    for step, path in zip((2, 4), run.checkpoints, strict=True):
        assert same(molora.load(run, checkpoint=step).model, path)
    shutil.copytree(run.path, tmp_path / "begun", ignore=shutil.ignore_patterns("adapter", "report*"))
    begun = Run.find(tmp_path / "begun")
    for wanted in (run, begun):  # finished or not, the same weights give the same scores
        report = evaluate(wanted, checkpoint=2)
        assert report.facts["checkpoint"] == "step 2" and report.folder == wanted.evaluations / "1"
        assert same(molora.load(wanted, checkpoint=2).model, run.checkpoints[0])
    assert evaluate(begun, checkpoint=4).scores == molora.evaluate(run).scores


def test_what_cannot_be_loaded(run: Run, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no undamaged checkpoint of step 3\. Steps it has: 2, 4"):
        molora.load(run, checkpoint=3)
    shutil.copytree(run.path, tmp_path / "damaged")
    file = tmp_path / "damaged" / "checkpoints" / "step-000002" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterError, match=r"no undamaged checkpoint of step 2\. Steps it has: 4"):
        molora.load(tmp_path / "damaged", checkpoint=2)
    model = torch.nn.Linear(2, 2)
    calls: dict[str, Callable[[], Any]] = {
        "adapter folder, which has no checkpoints": lambda: molora.load(run.adapter, checkpoint=2),
        "was given no adapter folder": lambda: molora.load(model),
        "are for molora.load": lambda: molora.load(model, run.adapter, device="cpu"),
        "the base is a model here": lambda: molora.load(run.path, run.adapter),
        "does not exist": lambda: molora.load(tmp_path / "nowhere"),
    }
    for said, call in calls.items():
        with pytest.raises(ConfigError, match=said):
            call()

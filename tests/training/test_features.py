"""Runs whose gate reads the prompt's cluster: trained, resumed and loaded with the very same clusters."""

from __future__ import annotations

import pytest
import torch

import molora
from molora import ConfigError
from molora.config import load_recipe
from molora.models.features import CLUSTERS_FILE
from molora.training.train import train
from molora.tuner.api import find_context
from tests.config.recipes import small
from tests.training.runs import write_encoder

pytest.importorskip("sklearn")


def recipe(tmp_path, **features):
    tasks = {
        name: {"source": "synthetic", "generator": name, "train_size": 24, "eval_size": 4}
        for name in ("copy", "reverse")
    }
    adapter = {"preset": "mocle", "target_modules": ["q_proj", "v_proj"], "gate": {"feature_dim": 3}}
    given = {"encoder": str(write_encoder(tmp_path / "encoder")), "num_clusters": 3, **features}
    run = small(adapter=adapter, data={"tasks": tasks, "max_length": 48}, features=given)
    run["train"] = {**run["train"], "max_steps": 4, "batch_size": 4, "save_every": 2}
    run["eval"] = {"batch_size": 4, "max_new_tokens": 3, "modes": ["gate", "base"]}
    return {**run, "output": str(tmp_path / "runs")}


def test_a_run_keeps_its_clusters_and_needs_no_features_afterwards(tmp_path):
    run = train(recipe(tmp_path))
    assert (run.path / CLUSTERS_FILE).is_file()
    from molora.models.build import load_trained

    model, tokenizer, _ = load_trained(run.path, device="cpu")
    source = find_context(model).source
    prompts = [tokenizer("copy(abc)=")["input_ids"], tokenizer("reverse(xyz)=")["input_ids"]]
    features = source(prompts)
    assert features.shape == (2, 3) and torch.equal(features.sum(1), torch.ones(2))
    batch = tokenizer(["copy(abc)=", "reverse(xyz)="], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        found = model(**batch).logits
        assert torch.equal(found, model(**batch, routing_features=features).logits)
        assert not torch.equal(found, model(**batch, routing_features=features.roll(1, dims=1)).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    cached = model.generate(**batch, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))
    assert torch.equal(cached, model.generate(**batch, routing_features=features, **options))
    report = molora.evaluate(run.path)
    assert {score.mode for score in report.scores} == {"gate", "base"}


def test_a_resumed_run_reads_its_clusters(tmp_path):
    whole = train(recipe(tmp_path))
    again = train(recipe(tmp_path), ["train.max_steps=6"], resume=True)
    assert again.path == whole.path
    assert (again.path / CLUSTERS_FILE).stat().st_mtime <= (again.adapter / "MANIFEST.json").stat().st_mtime


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "says where the features come from"),
        ({"adapter": {"num_experts": 2, "gate": "soft"}}, "acts only with a gate of scope external"),
        ({"features": {"encoder": "x", "num_clusters": 5}}, "must be features.num_clusters = 5"),
    ],
)
def test_gate_and_features_belong_together(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe({**recipe(tmp_path), **change})


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"features\.encoder: cannot load"):
        train(recipe(tmp_path, encoder=str(tmp_path / "nowhere")))
    assert not (tmp_path / "runs").exists()

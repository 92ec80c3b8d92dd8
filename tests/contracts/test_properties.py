"""Random mixtures: refused with a reason when they are made, or they do all that a mixture must.

The fast tests check 40 that are valid, the slow ones 300; seeds are fixed, so that a failure can be had again.
"""

from __future__ import annotations

import copy
import tempfile
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, reject, settings
from peft import PeftModel, get_peft_model
from pydantic import ValidationError
from torch.testing import assert_close

import molora
from molora import ConfigError, MoLoraConfig
from molora.config import AdapterConfig
from tests.contracts.strategies import adapters
from tests.zoo import base_model, batch_for, randomise, routed

BASE = base_model("llama")


def fixed(examples):
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def inputs(config, rows=(0, 1, 2)):
    """What the gate needs beside these rows of the batch, and the tasks where there are any."""
    given = routed("external", rows) if config.gate.scope == "external" else {}
    if config.tasks:
        names = list(config.tasks)
        given["routing_task_ids"] = [names[row % len(names)] for row in rows]
    return given


def made(options):
    """A config, or None where it is refused; the recipe's verdict is the same."""
    recipe = {k: v for k, v in copy.deepcopy(options).items() if k != "task_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = MoLoraConfig(**copy.deepcopy(options))
        except ConfigError as error:
            assert len(str(error)) > 20
            with pytest.raises(ValidationError):
                AdapterConfig.model_validate(recipe)
            return None
    AdapterConfig.model_validate(recipe)
    return config


def check(options):
    config = made(options)
    assume(config is not None)
    assert MoLoraConfig(**config.to_dict()).to_dict() == config.to_dict()
    batch, given = batch_for("llama", padding="right"), inputs(config)
    torch.manual_seed(0)
    try:
        model = get_peft_model(copy.deepcopy(BASE), config).eval()
    except ConfigError:  # what only the model can tell, such as a rank above a linear's width
        reject()
    starts_at_base = config.init != "svd_segments" and config.ffn_targets is None
    if starts_at_base:
        assert torch.equal(model(**batch, **given).logits, BASE(**batch).logits)
    randomise(model)
    model.train()
    for by in ("task", None) if config.tasks and config.gate.learned else (None,):
        with molora.routing(model, by=by):
            loss = model(**batch, **given).loss
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.eval()
    with torch.no_grad():
        logits = model(**batch, **given).logits
        rows_alone(model, config, batch, logits)
        if config.tasks and config.gate.learned:
            with molora.routing(model, by="task"):
                rows_alone(model, config, batch, model(**batch, **given).logits)
        saved_is_loaded(model, batch, given, logits)
        cache_changes_nothing(model, given)


def rows_alone(model, config, batch, logits):
    """I7: a sample's logits do not depend on the samples beside it."""
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        actual = model(**alone, **inputs(config, [row])).logits
        length = int(batch["attention_mask"][row].sum())
        assert_close(actual[0, :length], logits[row, :length], atol=2e-4, rtol=2e-4)


def saved_is_loaded(model, batch, given, logits):
    """I9, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        molora.save(model, folder)
        again = PeftModel.from_pretrained(copy.deepcopy(BASE), folder).eval()
    assert torch.equal(again(**batch, **given).logits, logits)


def cache_changes_nothing(model, given):
    """I8: greedy tokens and their logits with the key-value cache are those without."""
    ids = batch_for("llama", seq=4)["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_logits": True, **given}
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    cached = model.generate(**asked, use_cache=True, **options)
    plain = model.generate(**asked, use_cache=False, **options)
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


# A layer all of whose experts are always on.
LONELY = {
    "num_experts": [1, 2], "r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
    "gate": {"scope": "constant", "score": "table", "select": "dense"}, "init": "svd_segments",
    "always_on": {"expert_0": "rest"}, "aux_losses": {},
}  # fmt: skip


# A task's loss where each sample has a row for each split.
SPLIT = {
    "num_experts": 2, "r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
    "gate": {"scope": "task", "score": "table", "select": "dense", "splits": 2}, "combine": "factors",
    "tasks": {"alpha": ["expert_0"], "beta": ["expert_1"], "gamma": ["expert_0", "expert_1"]},
    "aux_losses": {"task_label": 0.1, "localized": 0.1},
}  # fmt: skip


# A gate that reads nothing, while tasks limit which experts each sample may use.
LIMITED = {
    "num_experts": 2, "r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
    "gate": {"scope": "constant", "score": "table", "select": "dense", "splits": 2}, "combine": "factors",
    "tasks": {"alpha": ["expert_0"], "beta": ["expert_1"], "gamma": ["expert_0", "expert_1"]}, "aux_losses": {},
}  # fmt: skip


@fixed(10)
@given(adapters())
@example(LONELY)
@example(SPLIT)
@example(LIMITED)
def test_random_mixtures(options):
    check(options)


@pytest.mark.slow
@fixed(300)
@given(adapters())
def test_many_random_mixtures(options):
    check(options)

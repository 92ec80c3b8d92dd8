"""Every published method on three architectures: builds, trains, saves, reloads bit-equal in a new process, generates."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.testing import assert_close

import molora
from molora.config.presets import PRESETS, preset_settings
from tests.zoo import base_model, batch_for, beyond, gradients, preset_inputs, preset_model

MODELS = ("llama", "bert", "t5")
# Over LoRAs that exist: from scratch its zero weights meet zero B, and nothing moves.
STILL = ("lorahub",)
# Not bit-equal to the base with untrained experts: starts of GOAT cancel, feed-forwards are averaged.
NEAR = ("mixlora", "mixlora_top_p")
presets = pytest.mark.parametrize("name", sorted(PRESETS))
# All of them are built on all three; how they train, reload and answer is seen on Llama and one of the others.
ALSO = {name: MODELS[1 + i % 2] for i, name in enumerate(sorted(PRESETS))}
WITH_ENCODER = ("mixlora", "mocle")  # seen at once on T5 too: over whole feed-forwards, and by features
PAIRS = [("llama", name) for name in ALSO] + [(architecture, name) for name, architecture in ALSO.items()]
pairs = pytest.mark.parametrize(
    ("architecture", "name"),
    [pytest.param(*pair, marks=() if pair[0] == "llama" else pytest.mark.slow) for pair in PAIRS],
)


def train(model, architecture, name, steps=3):
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = batch_for(architecture), []
    model.train()
    torch.manual_seed(0)
    for _ in range(steps):
        loss = model(**batch, **preset_inputs(model, name)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every preset trained and saved here, and loaded in one new process: on Llama, or on the others."""
    return cache(
        lambda on_llama: trained_on([p for p in PAIRS if (p[0] == "llama") == on_llama], tmp_path_factory)
    )


def trained_on(some, tmp_path_factory):
    """(losses, logits here, logits there) of these pairs."""
    root, expected, losses = tmp_path_factory.mktemp("presets"), {}, {}
    for architecture, name in some:
        model = preset_model(architecture, name)
        losses[architecture, name] = train(model, architecture, name)
        with torch.no_grad():
            logits = model.eval()(**batch_for(architecture), **preset_inputs(model, name)).logits
        expected[f"{architecture}+{name}"] = logits
        molora.save(model, root / "adapters" / f"{architecture}+{name}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.contracts.preset_loads", str(root)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return losses, expected, torch.load(root / "loaded.pt")


@pairs
def test_trains(trained, architecture, name):
    first, *_, last = trained(architecture == "llama")[0][architecture, name]
    assert last < first or (name in STILL and last <= first)


@pairs
def test_I9_reloads_bit_equal_in_a_new_process(trained, architecture, name):
    _, expected, loaded = trained(architecture == "llama")
    assert torch.equal(loaded[f"{architecture}+{name}"], expected[f"{architecture}+{name}"])


def test_molora_registers_the_method_where_peft_is_loaded_after_it(trained):
    """The other order: test_fresh_process."""
    assert trained(True)[2]["molora, then peft"] == "MoLoraConfig"


@pytest.mark.parametrize("architecture", beyond(MODELS, "llama", "bert"))
@presets
def test_I1_untrained_experts_leave_the_base(architecture, name):
    batch = batch_for(architecture)
    expected = base_model(architecture)(**batch).logits
    model = preset_model(architecture, name, lora_dropout=0.0)
    actual = model.eval()(**batch, **preset_inputs(model, name)).logits
    if name == "goat":  # the two experts chosen are not the mean of all
        assert (actual - expected).norm() < 0.1 * expected.norm()
    elif name in NEAR:
        assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (a, name) if a == "llama" or name in WITH_ENCODER else pytest.param(a, name, marks=pytest.mark.slow)
        for a, name in PAIRS
        if a != "bert"
    ],
)
def test_generates_with_the_cache_as_without(architecture, name):
    model = preset_model(architecture, name)
    train(model, architecture, name, steps=1)
    batch = batch_for(architecture)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **preset_inputs(model, name)}
    cached = model.eval().generate(**prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))


@presets
def test_every_trainable_parameter_gets_a_gradient(name):
    model = preset_model("llama", name, lora_dropout=0.0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in key or name in STILL):
                parameter.normal_(std=0.1)
    model.train()(**batch_for("llama"), **preset_inputs(model, name)).loss.backward()
    found = gradients(model)
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert sorted(found) == sorted(trainable)
    # A gate over one expert has nothing to learn.
    learning = {key: gradient for key, gradient in found.items() if name != "lora" or ".rows." not in key}
    assert not [
        key for key, gradient in learning.items() if not gradient.any() or not gradient.isfinite().all()
    ]


@presets
def test_the_description_is_short(name):
    assert 1 < (PRESETS[name].__doc__ or "").count("\n") <= 25


@presets
def test_a_recipe_means_the_same_mixture(name):
    from molora.config import AdapterConfig

    section = AdapterConfig.model_validate({"preset": name}).model_dump(exclude_none=True)
    config = molora.preset(name)
    built = molora.MoLoraConfig(**section, task_ids=config.task_ids, tasks=config.tasks) if config.tasks else (
        molora.MoLoraConfig(**section)
    )  # fmt: skip
    ours, theirs = built.to_dict(), config.to_dict()
    assert {key: value for key, value in ours.items() if key != "target_modules"} == {
        key: value for key, value in theirs.items() if key != "target_modules"
    }
    assert theirs["target_modules"] in (None, ours["target_modules"])


def test_dashes_and_overrides():
    assert molora.preset("mixlora-top-p").gate.top_p == 0.8
    config = molora.preset("mola", num_experts=[2, 4], gate={"top_k": 1, "renorm": "none"})
    assert (config.num_experts, config.experts_by_layer, config.gate.top_k) == (4, [2, 4], 1)
    with pytest.raises(molora.ConfigError, match="Did you mean 'mixlora'"):
        preset_settings("mixlorra", {})

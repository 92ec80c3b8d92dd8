"""Which bases a saved adapter goes on: a resized vocabulary and renamed modules are no other base; others need a word."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import molora
from molora import AdapterError, MoLoraConfig
from molora.disk.base_check import check_base
from molora.disk.fingerprint import base_fingerprint
from tests.zoo import ARCHITECTURES, VOCAB, base_model, batch_for, beyond, molora_model, randomise


def resized(architecture, tokens, seed=0):
    base = base_model(architecture, seed)
    base.resize_token_embeddings(tokens, mean_resizing=False)
    return base.eval()


@pytest.mark.parametrize("tokens", [VOCAB - 10, VOCAB + 14])
@pytest.mark.parametrize("architecture", beyond(ARCHITECTURES, "llama"))
def test_A4_a_resized_vocabulary_is_the_same_base_and_is_said(architecture, tokens, tmp_path):
    saved = molora_model(architecture)
    saved.save_pretrained(tmp_path)
    batch = {
        k: v.clamp(max=VOCAB - 11) if k == "input_ids" else v for k, v in batch_for(architecture).items()
    }
    batch.pop("labels") if architecture != "t5" else batch["labels"].clamp_(max=VOCAB - 11)
    expected = saved(**batch).logits
    for load in (molora.load, PeftModel.from_pretrained):
        with pytest.warns(UserWarning, match=f"{tokens} tokens, and had {VOCAB}"):
            model = load(resized(architecture, tokens), tmp_path)
        both = min(expected.shape[-1], tokens) if architecture != "bert" else expected.shape[-1]
        torch.testing.assert_close(model(**batch).logits[..., :both], expected[..., :both])
        with pytest.raises(AdapterError, match="another base model"):
            load(resized(architecture, tokens, seed=1), tmp_path)


def test_A4_common_rows_are_compared():
    stored, other = base_fingerprint(base_model("llama")), resized("llama", VOCAB + 4)
    with torch.no_grad():
        other.get_input_embeddings().weight[:VOCAB].mul_(1.01)
    with pytest.raises(AdapterError, match="another base model"):
        check_base(stored, other)


def test_A4_a_model_without_a_vocabulary_of_its_own_in_its_config_knows_how_many_tokens_it_had():
    base = base_model("llama")
    del base.config.vocab_size
    stored = base_fingerprint(base)
    assert stored["vocabulary"] == VOCAB
    other = resized("llama", VOCAB + 4)
    del other.config.vocab_size
    with pytest.warns(UserWarning, match="54 tokens, and had 50"):
        check_base(stored, other)


class Net(nn.Module):
    """Two layers under a name of one's choice."""

    def __init__(self, name, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.name = name
        setattr(self, name, nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)))

    def forward(self, x):
        for layer in getattr(self, self.name):
            x = layer["fc"](x).tanh()
        return x


def test_A4_modules_that_are_named_otherwise_are_mapped(tmp_path):
    model = get_peft_model(Net("layers"), MoLoraConfig(num_experts=2, r=2, target_modules=["fc"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    mapping = {"key_mapping": {r"^layers": "blocks"}}
    with pytest.warns(UserWarning, match="other names"):
        again = PeftModel.from_pretrained(Net("blocks"), tmp_path, **mapping)
    assert torch.equal(again(x), model.eval()(x))
    with pytest.raises(AdapterError, match="another base model"):
        PeftModel.from_pretrained(Net("blocks", seed=1), tmp_path, **mapping)


def test_A4_the_message_names_every_way_out_and_each_works(tmp_path):
    molora_model("llama").save_pretrained(tmp_path)
    with pytest.raises(AdapterError) as raised:
        molora.load(base_model("llama", seed=1), tmp_path)
    for way in ("allow_other_base=True", "--allow-other-base", "config.base_fingerprint = None"):
        assert way in str(raised.value)
    assert molora.load(base_model("llama", seed=1), tmp_path, allow_other_base=True).expert_names
    config = MoLoraConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    assert PeftModel.from_pretrained(base_model("llama", seed=1), tmp_path, config=config).expert_names


def test_A4_every_verb_that_loads_an_adapter_has_the_option():
    from typer.main import get_command

    from molora.cli.main import app

    verbs = get_command(app)
    context = verbs.make_context("molora", [], resilient_parsing=True)
    having = set()
    for name in verbs.list_commands(context):
        command = verbs.get_command(context, name)
        if any("--allow-other-base" in option.opts for option in command.params):
            having.add(name)
    assert having == {
        "add-expert",
        "chat",
        "eval",
        "export",
        "fuse",
        "generate",
        "inspect",
        "merge",
        "merge-experts",
        "route",
        "tokens",
    }


def test_A4_what_was_saved_before_counts_as_before(tmp_path):
    molora_model("llama").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    assert "vocabulary" not in stored and "----" not in "".join(stored["values"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_base(copy.deepcopy(stored), base_model("llama"))

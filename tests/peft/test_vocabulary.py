"""Special tokens: embeddings trained whole, and a vocabulary that was resized, survive saving and loading."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import molora
from molora import AdapterError, MoLoraConfig
from tests.zoo import base_model, batch_for

pytestmark = pytest.mark.filterwarnings("ignore:the base had", "ignore:Setting .save_embedding_layers")

EMBEDDINGS = {
    "embed": ["embed_tokens"],
    "head": ["lm_head"],
    "both": ["embed_tokens", "lm_head"],
    "none": None,
}
BATCH = {"input_ids": torch.tensor([[1, 53, 7, 52, 9]])}


@pytest.fixture(scope="module", params=["untied", "tied"])
def stored(request, tmp_path_factory):
    """A base on disk, as one gets it from a hub: 50 tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    base = base_model("llama")
    if request.param == "tied":
        config = LlamaConfig(**{**base.config.to_dict(), "tie_word_embeddings": True})
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
    base.save_pretrained(folder)
    return folder


def grown(folder, seed, tokens=54):
    """The base with new rows, which are random ones in every process."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(tokens, mean_resizing=False)
    torch.manual_seed(seed)
    for module in {base.get_input_embeddings(), base.get_output_embeddings()}:
        torch.nn.init.normal_(module.weight.data[50:])
    return base.requires_grad_(False).eval()


def adapted(base, modules):
    settings = {"num_experts": 2, "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, MoLoraConfig(**settings, modules_to_save=modules))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def save_with_peft(model, folder):
    model.save_pretrained(folder)


def save_all_with_peft(model, folder):
    model.save_pretrained(folder, save_embedding_layers=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("save", [save_with_peft, save_all_with_peft, molora.save])
@pytest.mark.parametrize("modules", list(EMBEDDINGS))
def test_A5_resized_embeddings_trained_whole_or_not_come_back(stored, modules, save, tmp_path):
    model = adapted(grown(stored, seed=1), EMBEDDINGS[modules])
    expected = model(**BATCH).logits
    for turn in range(2):
        save(model, tmp_path / str(turn))
        model = PeftModel.from_pretrained(grown(stored, seed=2 + turn), tmp_path / str(turn))
        assert torch.equal(model(**BATCH).logits, expected)
    again = molora.load(grown(stored, seed=5), tmp_path / "1")
    assert torch.equal(again(**BATCH).logits, expected)


@pytest.mark.parametrize("save", [save_with_peft, molora.save])
def test_A5_rows_added_to_an_adapted_model_are_saved_and_that_is_said(save, tmp_path):
    model = adapted(base_model("llama"), None)
    base = model.get_base_model()
    base.resize_token_embeddings(54, mean_resizing=False)
    torch.nn.init.normal_(base.get_input_embeddings().weight.data[50:])
    expected = model(**BATCH).logits
    with pytest.warns(UserWarning, match="had 50 tokens and has 54"):
        save(model, tmp_path / "adapter")
    again = base_model("llama")
    with pytest.raises(
        AdapterError, match=r"54 tokens, the base has 50; first base.resize_token_embeddings\(54\)"
    ):
        PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter")
    again.resize_token_embeddings(54, mean_resizing=False)
    assert torch.equal(molora.load(again, tmp_path / "adapter")(**BATCH).logits, expected)


def test_A5_embeddings_that_nobody_changed_are_not_saved(stored, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(stored)
    model = adapted(base, None)
    molora.save(model, tmp_path / "adapter")
    assert all("molora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert model(**batch_for("llama")).logits.isfinite().all()


def test_A5_what_an_adapter_brings_is_not_asked_of_the_base(tmp_path):
    """The base's own rows under a head trained whole are never used: others there are no other base."""
    adapted(base_model("llama"), ["lm_head"]).save_pretrained(tmp_path)
    other = base_model("llama")
    torch.nn.init.normal_(other.lm_head.weight)
    PeftModel.from_pretrained(other, tmp_path)
    other = base_model("llama")
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(AdapterError, match=r"values of model\.embed_tokens"):
        PeftModel.from_pretrained(other, tmp_path)

"""Merging into models whose head is several layers, and layer by layer after another adapter was added."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close

from molora import GateConfig, MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, batch_for, beyond, config_for, randomise

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
HEADS = {
    "Roberta": {}, "XLMRoberta": {}, "Electra": {"embedding_size": 8}, "MPNet": {},
    "BigBird": {"attention_type": "original_full"}, "Longformer": {"attention_window": 4}, "Esm": {},
    "ConvBert": {"embedding_size": 8, "conv_kernel_size": 3},
    "Funnel": {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
}  # fmt: skip
CONSTANT = GateConfig(scope="constant", select="dense")


def with_head(name):
    settings = {"vocab_size": 50, "pad_token_id": 1} if name == "Funnel" else SMALL
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings, **HEADS[name])
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("name", beyond(HEADS, "Electra", "Funnel"))
def test_A3_a_head_of_several_layers_is_put_back_as_it_was_trained(name, unload):
    base = with_head(name)
    config = MoLoraConfig(num_experts=2, r=2, target_modules="all-linear", gate=CONSTANT, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    randomise(model)
    inputs = {"input_ids": torch.arange(3, 19).view(2, 8)}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn(parameter.shape))
        expected = model.eval()(**inputs).logits
        if unload:  # as PEFT does: the trained head stays
            for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
                layer.set_adapter([])
            expected = model(**inputs).logits
        plain = model.unload() if unload else model.merge_and_unload()
        assert_close(plain(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert (
        isinstance(plain.classifier, nn.Module) and type(plain.classifier).__name__ != "ModulesToSaveWrapper"
    )


@pytest.mark.parametrize("activated", [False, True])
def test_A3_layers_are_merged_one_by_one_after_another_adapter_was_added(activated):
    model = get_peft_model(base_model("llama", dtype=torch.float64), config_for("llama", CONSTANT))
    model.add_adapter("other", config_for("llama", CONSTANT, target_modules=["q_proj"]))
    randomise(model)
    if activated:
        model.set_adapter("other")
    batch = batch_for("llama")
    expected = model.eval()(**batch).logits
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    for layer in layers:
        layer.merge()
    assert_close(model(**batch).logits, expected, atol=1e-9, rtol=1e-9)
    for layer in layers:
        if layer.merged:
            layer.unmerge()
    assert torch.equal(model(**batch).logits, expected)

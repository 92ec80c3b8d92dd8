"""What PEFT expects of a method, and what users of PEFT expect of any: tried as they would."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from molora import MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, batch_for

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TASK_MODELS = {
    "TOKEN_CLS": (BertForTokenClassification, "classifier", {"labels": torch.ones(2, 5, dtype=torch.long)}),
    "QUESTION_ANS": (
        BertForQuestionAnswering,
        "qa_outputs",
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
    ),
}


def task_base(task_type):
    torch.manual_seed(0)
    return TASK_MODELS[task_type][0](BertConfig(**SMALL)).eval()


def small(**settings):
    return MoLoraConfig(**{"num_experts": 2, "r": 2, "target_modules": "all-linear", **settings})


def targets(config):
    return {name.rpartition(".")[2] for name in config.target_modules}


@pytest.mark.parametrize("task_type", list(TASK_MODELS))
def test_A1_tasks_of_peft_whose_head_is_added_after_injection(task_type, tmp_path):
    config = small(task_type=task_type)
    model = get_peft_model(task_base(task_type), config)
    _, head, labels = TASK_MODELS[task_type]
    assert model.peft_config["default"] is config
    assert head in config.modules_to_save
    inputs = {"input_ids": torch.arange(1, 11).view(2, 5)}
    model.train()(**inputs, **labels).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(head in name for name in trained) and any("molora_" in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = model.eval()(**inputs)[0]
    for turn in range(3):  # PEFT appends the head's name at every load
        folder = tmp_path / str(turn)
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(task_base(task_type), folder)
        assert torch.equal(model(**inputs)[0], expected)
        saved = MoLoraConfig.from_pretrained(folder).modules_to_save
        assert len(saved) == len(set(saved)) and head in saved


def test_A1_a_config_is_the_callers_own_and_what_a_base_put_in_does_not_reach_the_next():
    config = small(num_experts=[2, 3], gate={"scope": "two_pass"}, task_type="CAUSAL_LM")
    first = get_peft_model(base_model("llama"), config)
    assert first.peft_config["default"] is config is first.base_model.context.adapters["default"].config
    assert config.gate.feature_dim == 16 and config.target_modules != "all-linear"
    config.lora_alpha = 4  # the caller's, and stays
    wide = base_model("gpt2")
    second = get_peft_model(wide, config)
    assert second.peft_config["default"] is config
    assert targets(config) == {"c_attn", "c_proj", "c_fc"} and config.lora_alpha == 4
    mine = first.peft_config["default"]
    assert mine is not config and mine is first.base_model.context.adapters["default"].config
    mounts = [mount for m in first.modules() if isinstance(m, MoLoraLayer) for mount in m.mounts.values()]
    assert mounts and all(mount.config is mine for mount in mounts)
    assert "q_proj" in targets(mine) and first.base_model.model.peft_config["default"] is mine


@pytest.mark.parametrize("second", ["same base", "other base"])
def test_A1_growing_and_saving_change_no_config_that_another_model_holds(second, tmp_path):
    config = small(task_type="CAUSAL_LM")
    first = get_peft_model(base_model("llama"), config)
    first.save_pretrained(tmp_path)
    other = get_peft_model(
        base_model("llama", seed=1) if second == "other base" else base_model("llama"), config
    )
    first.add_expert("late")
    other.freeze_experts("expert_0")
    assert first.expert_names == ["expert_0", "expert_1", "late"] and first.trainable_experts == ["late"]
    assert other.expert_names == ["expert_0", "expert_1"] and other.trainable_experts == ["expert_1"]
    assert config.num_experts == 2 and not config.frozen_experts and config.base_fingerprint is None


def test_A1_one_config_for_two_adapters_of_a_model():
    config = small(task_type="CAUSAL_LM")
    model = get_peft_model(base_model("llama"), config)
    model.add_adapter("other", config)
    assert model.peft_config["other"] is config is not model.peft_config["default"]
    model.set_adapter("other")
    model.add_expert("late")
    assert model.peft_config["other"].num_experts == 3 and model.peft_config["default"].num_experts == 2
    model.set_adapter("default")
    assert model(**batch_for("llama")).logits.isfinite().all()


def test_A1_a_config_of_a_copied_model_is_not_taken_from_it():
    model = get_peft_model(base_model("llama"), small(task_type="CAUSAL_LM"))
    twin = copy.deepcopy(model)
    config = twin.peft_config["default"]
    third = get_peft_model(base_model("gpt2"), config)
    assert "q_proj" in targets(config) and "c_attn" in targets(third.peft_config["default"])
    assert twin.peft_config["default"] is config


def test_A1_a_config_is_free_again_when_its_model_is_gone_or_could_not_be_built():
    config = small(task_type=None)
    with pytest.raises(ValueError):
        get_peft_model(base_model("llama"), small(target_modules=["nothing"], task_type="CAUSAL_LM"))
    failing = small(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError):
        get_peft_model(base_model("llama"), failing)
    assert failing.depth == 0
    inject_adapter_in_model(config, base_model("llama"))
    gc.collect()
    config.task_type = "TOKEN_CLS"
    model = get_peft_model(task_base("TOKEN_CLS"), config)
    assert model.peft_config["default"] is config and "query" in targets(config)

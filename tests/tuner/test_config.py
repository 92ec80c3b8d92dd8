"""MoLoraConfig: normalisation, refusals, presets, targets and groups."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig, get_peft_model

import molora
from molora import ConfigError, GateConfig, MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, config_for, molora_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2, "gate": GateConfig(top_k=3)}, "3 is more than num_experts = 2"),
        ({"gate": {"kind": "topk"}}, "Did you mean 'top_k'"),
        ({"gate": {"topk": 2}}, "gate.topk is not a setting. Did you mean 'top_k'"),
        ({"gate": GateConfig(top_k=1, renorm="sum")}, "never learn"),
        ({"num_experts": 0}, "at least 1"),
        ({"r": 0}, "integer of at least 1"),
        ({"lora_dropout": 1.0}, r"\[0, 1\)"),
        ({"init": "kaimin"}, "Did you mean 'kaiming'"),
        ({"scaling": "alpha", "use_rslora": True}, "both given"),
        ({"expert_names": ["a", "a"], "num_experts": 2}, "duplicates"),
        ({"expert_names": ["a"], "num_experts": 2}, "lists 1 names"),
        ({"expert_names": ["../a", "b"], "num_experts": 2}, "not allowed"),
        ({"tasks": {"t": ["expert_9"]}}, "not an expert"),
        ({"tasks": {"t": []}}, "names no expert"),
        (
            {"gate": GateConfig(scope="task"), "num_experts": 2, "tasks": ["a", "b", "c"]},
            "3 tasks, but num_experts=2",
        ),
        ({"tasks": ["a"], "task_ids": {"b": 0}}, "one id of its own"),
        ({"tasks": ["a"], "task_ids": {"a": -1}}, "negative"),
        ({"bias": "all"}, "only 'none'"),
    ],
)
def test_what_cannot_mean_anything_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MoLoraConfig(**settings)


def test_defaults_are_the_documented_ones():
    config = MoLoraConfig()
    assert (config.num_experts, config.r, config.lora_alpha) == (8, 8, 16)
    assert config.gate == GateConfig(scope="token", share="group", select="top_k", top_k=2, renorm="sum")
    assert MoLoraConfig(num_experts=1).gate.top_k == 1
    assert MoLoraConfig(gate=GateConfig(top_k=1)).gate.renorm == "none"


def test_a_config_survives_json(tmp_path):
    config = config_for("llama", tasks={"x": {"expert_0": 0.7, "expert_1": 0.3}}, frozen_experts=["expert_2"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOLORA"


def test_a_target_that_matches_nothing_lists_candidates_and_touches_nothing():
    base = base_model("llama")
    with pytest.raises(
        ConfigError, match=r"'q_prj' matches no module of LlamaForCausalLM. Did you mean 'q_proj'.*up_proj"
    ):
        get_peft_model(base, config_for("llama", target_modules=["q_prj", "v_proj"]))
    assert not any(isinstance(m, MoLoraLayer) for m in base.modules())
    with pytest.raises(ConfigError, match="is a Embedding"):
        get_peft_model(base_model("llama"), config_for("llama", target_modules=["embed_tokens"]))


@pytest.mark.parametrize(
    ("architecture", "gates"),
    [
        ("llama", {"q_proj", "o_proj", "gate_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("bert", {"query", "dense"}),
        ("t5", {"q", "k", "o", "wi_0", "wo"}),
    ],
)
def test_groups_hold_linears_that_read_the_same_input(architecture, gates):
    model = molora_model(architecture, "soft-group")
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    owners = {m.sites["default"].key.rsplit(".", 1)[1] for m in layers if m.molora_gate}
    assert owners == gates
    if architecture == "t5":  # k and v of cross attention read the encoder, q the decoder
        cross = [m for m in layers if "EncDecAttention.k" in m.sites["default"].key]
        assert cross and all(m.molora_gate and m.sites["default"].stream == "encoder" for m in cross)
        queries = [m for m in layers if "EncDecAttention.q" in m.sites["default"].key]
        assert queries and all(m.sites["default"].stream == "decoder" for m in queries)


def test_presets_fill_a_config_and_take_overrides():
    config = molora.preset("mola", num_experts=4, target_modules="all-linear")
    assert config.num_experts == 4 and config.gate.top_k == 2 and config.gate.share == "linear"
    assert molora.preset("molora").gate.select == "dense"
    assert molora.preset("lora").num_experts == 1
    assert molora.preset("mola", gate={"top_k": 3}).gate.share == "linear"  # one field of the gate replaced
    assert molora.preset("mola", gate={"kind": "soft"}).gate.share == "group"  # another gate altogether
    with pytest.raises(ConfigError, match="Did you mean 'mola'"):
        molora.preset("molla")

"""MoLoraConfig: normalisation, refusals, presets, targets and groups."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig, get_peft_model
from pydantic import ValidationError

import molora
from molora import ConfigError, GateConfig, MoLoraConfig
from molora.config import AdapterConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.parts import scaling_of
from tests.zoo import FEED_FORWARD, base_model, config_for, molora_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2, "gate": GateConfig(top_k=3)}, "3 is more than num_experts = 2"),
        ({"gate": {"kind": "topk"}}, "Did you mean 'top_k'"),
        ({"gate": {"topk": 2}}, "gate.topk is not a setting. Did you mean 'top_k'"),
        ({"gate": GateConfig(top_k=1, renorm="sum")}, "never learn"),
        ({"num_experts": 0}, "at least 1"),
        ({"r": 0}, "at least 1 and at most 65,536, everywhere"),
        ({"lora_dropout": 1.0}, r"\[0, 1\)"),
        ({"init": "kaimin"}, "Did you mean 'kaiming'"),
        ({"scaling": "alpha", "use_rslora": True}, "write only one of the two"),
        ({"expert_names": ["a", "a"], "num_experts": 2}, "'a' is there twice"),
        ({"expert_names": ["a"], "num_experts": 2}, "names 1 experts, but num_experts = 2"),
        ({"expert_names": ["../a", "b"], "num_experts": 2}, "not allowed"),
        ({"tasks": {"t": ["expert_9"]}}, "unknown expert 'expert_9'"),
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
    owners = {m.mounts["default"].key.rsplit(".", 1)[1] for m in layers if m.molora_gate}
    assert owners == gates
    if architecture == "t5":  # k and v of cross attention read the encoder, q the decoder
        cross = [m for m in layers if "EncDecAttention.k" in m.mounts["default"].key]
        assert cross and all(m.molora_gate and m.mounts["default"].stream == "encoder" for m in cross)
        queries = [m for m in layers if "EncDecAttention.q" in m.mounts["default"].key]
        assert queries and all(m.mounts["default"].stream == "decoder" for m in queries)


def test_presets_fill_a_config_and_take_overrides():
    config = molora.preset("mola", num_experts=4, target_modules="all-linear")
    assert config.num_experts == 4 and config.gate.top_k == 2 and config.gate.share == "linear"
    assert molora.preset("molora").gate.select == "dense"
    assert molora.preset("lora").num_experts == 1
    assert molora.preset("mola", gate={"top_k": 3}).gate.share == "linear"  # one field of the gate replaced
    assert molora.preset("mola", gate={"kind": "soft"}).gate.share == "group"  # another gate altogether
    with pytest.raises(ConfigError, match="Did you mean 'mola'"):
        molora.preset("molla")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*up_proj"},
        {"target_modules": ["up_proj"], "plain_targets": ["q_proj"]},
        {"target_modules": ["up_proj"], "ffn_targets": FEED_FORWARD},
        {"target_modules": "all-linear"},
    ],
)
def test_layers_to_transform_limits_every_kind_of_target(options):
    config = MoLoraConfig(num_experts=2, layers_to_transform=[1], **options)
    model = get_peft_model(base_model("llama"), config)
    keys = [m.mounts["default"].key for m in model.modules() if isinstance(m, MoLoraLayer)]
    assert keys and all(".1." in key for key in keys)


def test_a_list_longer_than_the_model_is_refused():
    with pytest.raises(ConfigError, match="list of 4 numbers, one per block, but the model has 2"):
        molora_model("llama", GateConfig(top_k=1), num_experts=[2, 3, 4, 5], tasks=None)


@pytest.mark.parametrize("name", molora.list_presets())
def test_a_preset_adapts_the_same_linears_in_python_as_in_a_recipe(name):
    recipe = AdapterConfig.model_validate({"preset": name})
    targets = molora.preset(name).target_modules
    assert (sorted(targets) if isinstance(targets, set) else targets) == recipe.target_modules


@pytest.mark.parametrize(
    ("name", "scaling"), [("moelora", 2.0), ("coin", 2.0), ("adamole", 4.0), ("poly", 1 / 8), ("goat", 16.0)]
)
def test_a_presets_scaling_follows_alpha_and_rank(name, scaling):
    for factor in (1, 2):
        config = molora.preset(name)
        config = molora.preset(name, lora_alpha=config.lora_alpha * factor)
        assert scaling_of(config, config.expert_names[0], "q_proj") == scaling * factor


def test_fields_of_a_gate_that_do_not_act_are_refused_but_a_presets_own_are_dropped():
    for settings in (
        {"threshold": 0.2}, {"top_p": 0.5}, {"pool": "last"}, {"hidden": 8}, {"embedding_dim": 8}, {"noise_std": 0.1},
        {"select": "dense", "min_k": 2}, {"blend_spread": 1.0}, {"entropy_index": 2.0}, {"entropy_threshold": 0.5},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="acts only with"):
            GateConfig(**settings)
        with pytest.raises(ValidationError, match="acts only with"):
            AdapterConfig.model_validate({"gate": settings})
    gate = molora.preset("dynmole", gate={"select": "top_k", "top_k": 3}).gate
    assert (gate.select, gate.top_k, gate.top_p, gate.min_k) == ("top_k", 3, 0.8, 1)
    with pytest.raises(ConfigError, match="acts only with"):
        molora.preset("dynmole", gate={"select": "top_k", "top_p": 0.5})


def test_a_config_object_can_be_used_again(tmp_path):
    config = molora.preset("goat", r=2)
    first = get_peft_model(base_model("llama"), config)
    first.save_pretrained(tmp_path)
    first.add_expert("late")
    assert config.base_fingerprint is None and config.num_experts == molora.preset("goat").num_experts
    again = get_peft_model(base_model("llama", seed=5), config)
    banks = [m.molora_experts["default"] for m in again.modules() if isinstance(m, MoLoraLayer)]
    assert all(bank.B.any() for bank in banks)

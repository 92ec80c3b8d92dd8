"""What users of PEFT's LoRA expect of a method: built with PEFT's LoRA as the oracle, or refused by name."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import fields

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.testing import assert_close

import molora
from molora import ConfigError, GateConfig, MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.lora_fields import INSTEAD
from tests.zoo import base_model, batch_for, config_for, molora_model, randomise

CONSTANT = GateConfig(scope="constant", select="dense")
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
BATCH = batch_for("llama")


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def lora_and_ours(base=base_model, **settings):
    """PEFT's LoRA, and one expert with the same factors."""
    lora = get_peft_model(
        base("llama", dtype=torch.float64), LoraConfig(**LORA, **settings), autocast_adapter_dtype=False
    )
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            nn.init.normal_(parameter, std=0.3)
    config = MoLoraConfig(num_experts=1, gate=CONSTANT, **LORA, **settings)
    ours = get_peft_model(base("llama", dtype=torch.float64), config)
    theirs = get_peft_model_state_dict(lora)
    state = get_peft_model_state_dict(ours)
    for key in state:
        plain = re.sub(r"molora_experts\.(?:lora_)?([AB])$", r"lora_\1.weight", key)
        if plain in theirs:  # all but the gate, which weighs one expert with 1
            state[key] = theirs[key] if key == plain else theirs[plain].unsqueeze(0)
    set_peft_model_state_dict(ours, state)
    return lora, ours


# -- how strongly an adapter acts ----------------------------------------------------------------------


def layers(model):
    return [m for m in model.modules() if hasattr(m, "scale_layer")]


def test_A7_one_expert_acts_as_strongly_as_a_lora_through_every_change_of_scale():
    lora, ours = lora_and_ours()
    assert_close(logits(ours), logits(lora), atol=1e-12, rtol=1e-12)
    before = logits(ours)
    for change in (
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("default", 0.25),
        lambda layer: layer.set_scale("nobody", 9.0),
        lambda layer: layer.scale_layer(4.0),
        lambda layer: layer.unscale_layer(),
    ):
        for model in (lora, ours):
            for layer in layers(model):
                change(layer)
        assert_close(logits(ours), logits(lora), atol=1e-12, rtol=1e-12)
    assert torch.equal(logits(ours), before)


@pytest.mark.parametrize("multiplier", [0, 0.5, 2.0])
def test_A7_rescale_adapter_scale_is_pefts_and_ends(multiplier):
    lora, ours = lora_and_ours()
    before = logits(ours)
    with rescale_adapter_scale(lora, multiplier):
        expected = logits(lora)
    with molora.rescale_adapter_scale(ours, multiplier):
        assert_close(logits(ours), expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(logits(ours), before)


def test_A7_a_mixture_scaled_in_a_decoding_loop_is_not_computed_with_what_was_kept():
    model = molora_model("llama", "task-group")
    prompt = {
        "input_ids": BATCH["input_ids"][:1],
        "routing_task_ids": ["alpha"],
        "max_new_tokens": 6,
        "do_sample": False,
    }
    expected = model.generate(**prompt)
    with molora.rescale_adapter_scale(model, 0.0):
        with model.disable_adapter():
            base = model.generate(**prompt)
        assert torch.equal(model.generate(**prompt), base)
    assert torch.equal(model.generate(**prompt), expected)
    with pytest.raises(ConfigError, match="is not a number"), molora.rescale_adapter_scale(model, "2"):
        pass
    with (
        pytest.raises(ConfigError, match="no molora adapter"),
        molora.rescale_adapter_scale(nn.Linear(2, 2), 2),
    ):
        pass


# -- hotswap -------------------------------------------------------------------------------------------


def test_A7_hotswap_puts_another_adapter_in_the_same_parameters(tmp_path):
    model, other = molora_model("llama", "task-group"), molora_model("llama", "task-group", lora_alpha=2)
    randomise(other, seed=11)
    other.save_pretrained(tmp_path)
    ids = {"routing_task_ids": ["alpha", "beta", "gamma"]}
    expected = other(**BATCH, **ids).logits
    parameters = dict(model.named_parameters())
    assert not torch.allclose(model(**BATCH, **ids).logits, expected, atol=1e-2)
    molora.hotswap(model, tmp_path)
    assert torch.equal(model(**BATCH, **ids).logits, expected)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.peft_config["default"].lora_alpha == 2
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        PeftModel.from_pretrained(base_model("llama"), tmp_path / "again")(**BATCH, **ids).logits, expected
    )


def test_A7_hotswap_of_another_form_or_base_changes_nothing(tmp_path):
    model = molora_model("llama")
    before = logits(model)
    molora_model("llama", r=2).save_pretrained(tmp_path / "rank")
    molora_model("llama", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"differs in r\b"):
        molora.hotswap(model, tmp_path / "rank")
    with pytest.raises(molora.AdapterError, match="another base"):
        molora.hotswap(model, tmp_path / "base")
    assert torch.equal(logits(model), before)


# -- other methods -------------------------------------------------------------------------------------


def test_A7_convert_to_lora_makes_a_lora_of_a_fixed_mixture_and_names_what_it_cannot():
    model = molora_model("llama", "constant-global", r=1, dtype=torch.float64)
    config, state = convert_to_lora(model, rank=3)
    lora = get_peft_model(base_model("llama", dtype=torch.float64), config, autocast_adapter_dtype=False)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert_close(logits(lora), logits(model), atol=1e-4, rtol=1e-4)
    for gate in ("top2-group", "task-group"):
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(molora_model("llama", gate), rank=3)


@pytest.mark.parametrize("first", ["lora", "molora"])
def test_A7_a_lora_beside_a_mixture_adds_up_in_transformers_integration(first):
    def put(names):
        base = base_model("llama", dtype=torch.float64)
        for name in names:
            config = LoraConfig(**{**LORA, "task_type": None}, init_lora_weights=False)
            base.add_adapter(
                config if name == "lora" else config_for("llama", CONSTANT, task_type=None), name
            )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in sorted(
                base.named_parameters(), key=lambda item: item[0].replace(".base_layer", "")
            ):
                if ".lora." in key or ".molora." in key:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
                    )
        return base

    both = put(["lora", "molora"] if first == "lora" else ["molora", "lora"])
    plain = logits(base_model("llama", dtype=torch.float64))
    seen = {}
    for active in (["lora"], ["molora"], ["lora", "molora"]):
        both.set_adapter(active)
        seen[tuple(active)] = logits(both)
        assert not torch.allclose(seen[tuple(active)], plain, atol=1e-2)
    both.set_adapter(["lora"])
    alone = put(["lora"])
    values = {k.replace(".base_layer", ""): v for k, v in both.state_dict().items() if ".lora." in k}
    mine = {k: values[k.replace(".base_layer", "")] for k in alone.state_dict() if ".lora." in k}
    alone.load_state_dict(mine, strict=False)
    assert_close(logits(alone), seen[("lora",)], atol=1e-12, rtol=1e-12)
    both.disable_adapters()
    assert torch.equal(logits(both), plain)


def test_A7_peft_itself_keeps_two_methods_apart():
    with pytest.raises(ValueError, match="different peft types"):
        molora_model("llama").add_adapter("lora", LoraConfig(**LORA))


# -- settings of LoraConfig ----------------------------------------------------------------------------


def tied(architecture, **options):
    base = base_model(architecture)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**base.config.to_dict(), "tie_word_embeddings": True})
    )
    return model.to(options.get("dtype", torch.float32)).requires_grad_(False).eval()


SHARED = {
    "token indices": {"trainable_token_indices": [1, 2, 3]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]}},
    "tied tokens": {"trainable_token_indices": [1, 2], "ensure_weight_tying": True},
    "tied whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "replicated": {"layer_replication": [(0, 2), (1, 2)]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("base", [base_model, tied])
@pytest.mark.parametrize("name", list(SHARED))
def test_A7_what_peft_does_beside_the_linears_is_as_with_a_lora(name, base, tmp_path):
    if name == "tied whole" and base is base_model:
        base = tied
    settings = SHARED[name]
    lora, ours = lora_and_ours(base, **copy.deepcopy(settings))
    assert_close(logits(ours), logits(lora), atol=1e-12, rtol=1e-12)
    expected, trained = (
        logits(ours),
        {n for n, p in ours.named_parameters() if p.requires_grad and "molora_" not in n},
    )
    assert trained == {n for n, p in lora.named_parameters() if p.requires_grad and "lora_" not in n}
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(base("llama", dtype=torch.float64), tmp_path / "ours")
    assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    molora.export_lora(ours, tmp_path / "lora", expert="expert_0")
    stock = PeftModel.from_pretrained(base("llama", dtype=torch.float64), tmp_path / "lora")
    assert_close(logits(stock), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(molora.AdapterError, match="another base"):
        PeftModel.from_pretrained(base_model("llama", seed=4, dtype=torch.float64), tmp_path / "ours")


def test_A7_replicated_blocks_have_experts_of_their_own_and_are_not_merged():
    model = molora_model("llama", "constant-global", layer_replication=[(0, 2), (0, 2)])
    names = model.targeted_module_names
    assert len({name.split(".")[2] for name in names}) == 4
    with pytest.raises(ConfigError, match="share their weights"):
        model.merge_and_unload()
    with pytest.raises(ConfigError, match="has an adapter already"):
        model.add_adapter("two", config_for("llama", layer_replication=[(0, 2), (0, 2)]))
    with pytest.raises(ConfigError, match="layer_replication"):
        get_peft_model(
            nn.Sequential(nn.Linear(2, 2)), MoLoraConfig(target_modules=["0"], layer_replication=[(0, 1)])
        )


OURS = {f.name for f in fields(MoLoraConfig)}


@pytest.mark.parametrize("name", sorted({f.name for f in fields(LoraConfig)} - OURS - {"fan_in_fan_out"}))
def test_A7_every_other_setting_of_a_lora_config_is_refused_with_what_to_use(name):
    assert name in INSTEAD
    with pytest.raises(ConfigError, match=rf"{name} is a setting of PEFT's LoraConfig[\s\S]*hint: "):
        MoLoraConfig(target_modules=["q_proj"], **{name: "something"})
    MoLoraConfig(target_modules=["q_proj"], **{name: getattr(LoraConfig(), name)})  # asks for nothing


def test_A7_no_setting_is_explained_that_there_is_not_and_others_are_pythons_error():
    assert {*INSTEAD} <= {f.name for f in fields(LoraConfig)} - OURS
    MoLoraConfig(target_modules=["q_proj"], fan_in_fan_out=True)
    with pytest.raises(TypeError, match="nonsense"):
        MoLoraConfig(nonsense=1)


def test_A7_files_that_use_none_of_it_are_written_as_before(tmp_path):
    plain = config_for("llama").to_dict()
    assert not {"trainable_token_indices", "ensure_weight_tying", "layer_replication"} & plain.keys()


# -- targets -------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0]) + self.conv(x.mT).mT


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("conv", "Conv1d; experts go on linear layers[\\s\\S]*PEFT's LoraConfig adapts convolutions"),
        ("attention", "MultiheadAttention; experts go on[\\s\\S]*PEFT's LoraConfig adapts it"),
        ("out_proj", "without calling the layer[\\s\\S]*PEFT's LoraConfig adapts it"),
    ],
)
def test_A7_other_layers_are_refused_with_what_to_do(target, says):
    with pytest.raises(ConfigError, match=says):
        get_peft_model(Attends(), MoLoraConfig(target_modules=[target]))


def test_A7_embeddings_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        molora_model("llama", target_modules=["embed_tokens"])


def test_A7_all_linear_leaves_out_what_attention_uses_unseen_and_says_so(tmp_path):
    torch.manual_seed(0)
    base = Attends()
    with pytest.warns(UserWarning, match=r"no experts on attention\.out_proj"):
        model = get_peft_model(copy.deepcopy(base), MoLoraConfig(num_experts=2, target_modules="all-linear"))
    assert model.targeted_module_names == ["fc"] == sorted(model.peft_config["default"].target_modules)
    randomise(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
FUSED = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}


@pytest.mark.parametrize("name", list(FUSED))
def test_A7_all_linear_says_which_fused_experts_it_leaves_as_they_are(name):
    config = getattr(transformers, f"{name}Config")(**SMALL, **FUSED[name])
    base = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.warns(
        UserWarning, match=r"leaves \d\d% of the weights.*experts\.down_proj, experts\.gate_up_proj"
    ):
        model = get_peft_model(base, MoLoraConfig(num_experts=2, target_modules="all-linear"))
    assert all(
        isinstance(m.get_base_layer(), nn.Linear) for m in model.modules() if isinstance(m, MoLoraLayer)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = molora_model("llama")
        model.add_adapter(
            "second", MoLoraConfig(num_experts=2, target_modules="all-linear")
        )  # nor are its own experts

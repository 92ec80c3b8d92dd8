"""Gates that several inputs follow: per block, and by a regular expression on module names."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

import molora
from molora import GateConfig, MoLoraConfig, RoutingError
from molora.tuner.layer import MoLoraLayer
from molora.tuner.targets import group_key
from tests.zoo import base_model, batch_for, config_for, gradients, randomise


def gates(model):
    return [m for m in model.modules() if isinstance(m, MoLoraLayer) and "default" in m.molora_gate]


def shared(share, architecture="llama"):
    torch.manual_seed(1)
    config = config_for(architecture)
    config.gate.share = share
    model = get_peft_model(base_model(architecture), config)
    randomise(model)
    return model.eval()


def test_a_regex_that_names_blocks_is_a_gate_per_block():
    block, regex = shared("block"), shared(r"(layers\.\d+)\.")
    assert len(gates(block)) == len(gates(regex)) == 2
    batch = batch_for("llama")
    outs = []
    for model in (block, regex):
        out = model(**batch)
        out.loss.backward()
        outs.append((out.logits, gradients(model)))
    assert_close(outs[0], outs[1])


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_a_block_of_two_sequences_has_a_gate_for_each(architecture):
    model = shared("block", architecture)
    streams = {(m.mounts["default"].key, m.mounts["default"].stream) for m in gates(model)}
    crossing = [key for key, stream in streams if stream == "encoder" and "decoder" in key]
    assert len(crossing) == (2 if architecture == "t5" else 0)  # keys and values of cross attention
    out = model(**batch_for(architecture, padding="right"))
    out.loss.backward()
    assert all(m.molora_gate["default"].rows.blocks[0].grad.abs().max() > 0 for m in gates(model))


def test_every_linear_of_a_block_follows_one_decision():
    model, batch = shared("block"), batch_for("llama")
    seen = []
    for layer in gates(model):
        layer.molora_gate["default"].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        expected = model(**batch).logits
    assert len(seen) == 2
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    assert all(
        m.mounts["default"].leader.gate in [g.molora_gate["default"] for g in gates(model)] for m in layers
    )
    with torch.no_grad():  # another decision of the first block changes every linear after it
        gates(model)[0].molora_gate["default"].rows.blocks[0].neg_()
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)


@pytest.mark.parametrize("share", ["block", r"^(model)\."])
def test_gates_across_checkpointed_regions_give_the_same_gradients(share):
    batch, results = batch_for("llama"), []
    for checkpointing in (False, True):
        model = shared(share).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(**batch)
        model(**batch_for("llama", seed=5))  # another forward in between
        out.loss.backward()
        results.append((out.loss.detach(), gradients(model)))
    assert_close(results[0], results[1])


def test_a_layer_on_its_own_has_no_decision_to_follow():
    model = shared("block")
    block = model.base_model.model.model.layers[0]
    with pytest.raises(
        RoutingError, match=r"share the gate at model.layers.0.self_attn.q_proj, which has not run"
    ):
        block.mlp(torch.randn(1, 3, 16))
    with molora.routing(model, experts=["expert_1"]):  # nothing to decide
        assert block.mlp(torch.randn(1, 3, 16)).shape == (1, 3, 16)


@pytest.mark.parametrize(("key", "share", "expected"), [
    ("model.layers.3.mlp.up_proj", "block", "model.layers.3 decoder"),
    ("transformer.h.0.attn.c_attn", "block", "transformer.h.0 decoder"),
    ("bert.pooler.dense", "block", "bert.pooler.dense"),
    ("model.layers.3.mlp.up_proj", r"\.(mlp)\.", "mlp decoder"),
    ("model.layers.3.self_attn.q_proj", r"\.(mlp)\.", "model.layers.3.self_attn.q_proj"),
    ("model.layers.3.self_attn.v_proj", "group", "model.layers.3.self_attn.[q_proj].shared"),
    ("model.layers.3.self_attn.v_proj", "linear", "model.layers.3.self_attn.v_proj"),
    ("anything", "global", ""),
])  # fmt: skip
def test_names_of_groups(key, share, expected):
    assert group_key(key, share, "decoder") == expected


def test_linears_may_be_called_in_another_order_than_they_are_registered():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0,
    )  # fmt: skip
    batch = batch_for("llama")
    batch["input_ids"] = batch["input_ids"] % 50
    batch["labels"] = batch["labels"].clamp(max=49)
    outs = []
    for share in ("block", r"(layers\.\d+)\."):
        torch.manual_seed(0)
        settings = MoLoraConfig(num_experts=3, r=2, target_modules="all-linear", gate=GateConfig(share=share))
        model = get_peft_model(OPTForCausalLM(config), settings)
        names = [m.mounts["default"].key for m in gates(model)]
        assert [n.rpartition(".")[2] for n in names if "layers" in n] == ["k_proj", "k_proj"]
        randomise(model)
        outs.append(model.eval()(**batch).logits)
    assert_close(*outs)
    assert outs[0].isfinite().all()

"""Every entry point of PEFT and of transformers' PEFT integration, on each architecture (loading: test_fresh_process)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from torch.testing import assert_close

import molora
from molora import AdapterError, ConfigError, RoutingError
from molora.tuner.layer import MoLoraLayer
from tests.zoo import (
    ARCHITECTURES,
    GATES,
    base_model,
    batch_for,
    beyond,
    config_for,
    gradients,
    molora_model,
    pairs,
    randomise,
    routed,
)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
# PEFT's entry points meet names and heads, not what the blocks are: at once on a decoder and on one with a head.
two_architectures = pytest.mark.parametrize("architecture", beyond(ARCHITECTURES, "llama", "bert"))
CLASSES = {"llama": "CausalLM", "gpt2": "CausalLM", "bert": "SequenceClassification", "t5": "Seq2SeqLM"}


def logits(model, architecture, gate="top2-group"):
    with torch.no_grad():
        return model.eval()(**batch_for(architecture), **routed(gate)).logits


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def two_adapters(architecture, gate="top2-group", dtype=torch.float32, **options):
    """A model with trained adapters `default` (seed 2) and `second` (seed 3); `default` is active."""
    model = molora_model(architecture, gate, dtype=dtype, **options)
    model.add_adapter("second", config_for(architecture, gate, r=3, **options))
    for name, seed in (("default", 2), ("second", 3)):
        model.set_adapter(name)
        randomise_adapter(model, name, seed)
    model.set_adapter("default")
    return model


@torch.no_grad()
def randomise_adapter(model, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and ("lora_B" in name or "molora_gate" in name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


# -- PEFT: building, counting, disabling ---------------------------------------------------------------


@two_architectures
def test_get_peft_model_trains_only_the_adapter(architecture, capsys):
    model = molora_model(architecture).train()
    assert type(model).__name__ == f"PeftModelFor{CLASSES[architecture]}"
    model(**batch_for(architecture)).loss.backward()
    assert gradients(model) and set(gradients(model)) == trainable(model)
    assert all("molora_" in name or "modules_to_save" in name for name in trainable(model))
    count, total = model.get_nb_trainable_parameters()
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad) < total
    model.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@architectures
@pytest.mark.parametrize("gate", ["top2-group", "task-group"])
def test_disable_adapter_is_bit_equal_to_the_base(architecture, gate):
    expected = logits(base_model(architecture), architecture)
    model = molora_model(architecture, gate)
    before, trained = logits(model, architecture, gate), trainable(model)
    assert not torch.allclose(before, expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, architecture), expected)  # a task gate asks for no ids here
    assert torch.equal(logits(model, architecture, gate), before)
    assert trainable(model) == trained


@two_architectures
def test_unload_gives_the_plain_base_back(architecture):
    base = molora_model(architecture).unload()
    assert torch.equal(logits(base, architecture), logits(base_model(architecture), architecture))
    assert not base._forward_pre_hooks and not base._forward_hooks


@two_architectures
def test_model_and_layer_status_know_the_method(architecture):
    model = molora_model(architecture)
    status = get_model_status(model)
    assert status.peft_types == {"default": "MOLORA"} and status.active_adapters == ["default"]
    assert status.enabled is True and status.num_adapter_layers == len(get_layer_status(model)) > 0


# -- PEFT: several adapters ----------------------------------------------------------------------------


@two_architectures
def test_adapters_are_added_switched_and_deleted(architecture):
    model = two_adapters(architecture)
    first = logits(model, architecture)
    model.set_adapter("second")
    second = logits(model, architecture)
    assert not torch.allclose(first, second, atol=1e-2)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert torch.equal(logits(model, architecture), second)
    assert not any(".default." in name for name in model.state_dict())


@two_architectures
def test_two_active_adapters_add_up(architecture):
    gate = "constant-linear"
    model = two_adapters(architecture, gate, torch.float64, task_type=None)  # PEFT allows one head at a time
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, architecture, gate)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert_close(logits(merged, architecture), both, atol=1e-9, rtol=1e-9)


@architectures
def test_load_adapter_under_another_name(architecture, tmp_path):
    saved = molora_model(architecture)
    saved.save_pretrained(tmp_path)
    model = molora_model(architecture, seed=0, trained=False)
    model.load_adapter(tmp_path, adapter_name="other")
    model.set_adapter("other")
    assert torch.equal(logits(model, architecture), logits(saved, architecture))
    with pytest.raises(AdapterError, match=r"shape \(3, .*expected \(4, "):
        wrong = get_peft_model(base_model(architecture), config_for(architecture, num_experts=4, tasks=None))
        set_peft_model_state_dict(wrong, get_peft_model_state_dict(saved))


@two_architectures
def test_inject_adapter_in_model(architecture):
    config = config_for(architecture, task_type=None)
    plain = base_model(architecture)
    saved = inject_adapter_in_model(config, plain)
    assert saved is plain
    randomise(saved)
    model = inject_adapter_in_model(config, base_model(architecture))
    assert not set_peft_model_state_dict(model, get_peft_model_state_dict(saved)).unexpected_keys
    expected = logits(saved, architecture)
    assert torch.equal(logits(model, architecture), expected)
    with molora.routing(model, experts=["expert_0"]):
        assert not torch.equal(logits(model, architecture), expected)


def test_mixed_and_hotswap_are_refused_clearly(tmp_path):
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(base_model("llama"), config_for("llama"), mixed=True)
    model = molora_model("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but MOLORA was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    with pytest.raises(RoutingError, match="adapter_names is not supported"):
        model(**batch_for("llama"), adapter_names=["default"] * 3)


def test_targets_and_layers_that_cannot_be_adapted_are_refused():
    with pytest.raises(ConfigError, match=r"matches no module.*q_proj"):
        molora_model("llama", target_modules=["q_prj"])
    with pytest.raises(ConfigError, match="Embedding; experts go on linear layers"):
        molora_model("llama", target_modules=["embed_tokens"])


# -- transformers' own integration ---------------------------------------------------------------------


@two_architectures
def test_transformers_adds_saves_switches_and_deletes(architecture, tmp_path):
    model, plain = base_model(architecture), logits(base_model(architecture), architecture)
    model.add_adapter(config_for(architecture, task_type=None), "mine")
    assert torch.equal(logits(model, architecture), plain)
    randomise(model)
    mine = logits(model, architecture)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path)
    assert torch.equal(logits(loaded, architecture), mine)

    model.load_adapter(str(tmp_path), adapter_name="again")
    model.add_adapter(config_for(architecture, task_type=None), "fresh")
    assert torch.equal(logits(model, architecture), plain)
    for name in ("again", "mine"):
        model.set_adapter(name)
        assert torch.equal(logits(model, architecture), mine)
    model.disable_adapters()
    assert torch.equal(logits(model, architecture), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, architecture), mine)
    model.delete_adapter(["mine", "fresh"])
    model.set_adapter("again")
    assert torch.equal(logits(model, architecture), mine)


# -- merging -------------------------------------------------------------------------------------------


@two_architectures
def test_merged_expert_weights_are_the_forced_mixture(architecture):
    model = molora_model(architecture, dtype=torch.float64)
    weights = {"expert_0": 0.25, "expert_2": 1.5}
    with molora.routing(model, experts=weights):
        expected = logits(model, architecture)
    for given in (weights, [0.25, 0.0, 1.5]):
        merged = copy.deepcopy(model).merge_and_unload(expert_weights=given, safe_merge=True)
        assert not any(isinstance(m, MoLoraLayer) for m in merged.modules())
        assert_close(logits(merged, architecture), expected, atol=1e-9, rtol=1e-9)


@two_architectures
def test_an_input_dependent_gate_is_not_merged_and_the_model_lives_on(architecture):
    model = molora_model(architecture)
    before = logits(model, architecture)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match="weights depend on the input"):
            merge()
    assert torch.equal(logits(model, architecture), before)
    task = molora_model(architecture, "task-group")
    with pytest.raises(ConfigError, match="name one: merge_and_unload"):
        task.merge_and_unload()


@architectures
@pytest.mark.parametrize("gate", ["constant-global", "task-group"])
def test_merge_adapter_is_undone_exactly(architecture, gate):
    model = molora_model(architecture, gate)
    ids = {"routing_task_ids": "beta"} if gate == "task-group" else {}
    batch = batch_for(architecture)
    with torch.no_grad():
        expected = model(**batch, **ids).logits
        model.merge_adapter(**({"task": "beta"} if ids else {}))
        assert_close(model(**batch, **ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert all(m.merged_adapters == ["default"] for m in model.modules() if isinstance(m, MoLoraLayer))
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, base_model(architecture)(**batch).logits)
        model.merge_adapter(**({"task": "beta"} if ids else {}))
        model.unmerge_adapter()
        assert torch.equal(model(**batch, **ids).logits, expected)


# -- copies --------------------------------------------------------------------------------------------


# What is copied of a gate does not depend on the architecture; streams, heads and what a scope keeps do.
COPIED = [pair for pair in pairs(GATES) if pair[0] == "llama" or pair[1].startswith("sequence")]


@pytest.mark.parametrize(("architecture", "gate"), COPIED)
def test_copies_and_pickles_are_independent_and_bit_equal(architecture, gate, tmp_path):
    aux_losses = {"balance": 0.1} if not gate.startswith("task") else {}
    model = molora_model(architecture, gate, blocks=1, aux_losses=aux_losses)
    model.train()(**batch_for(architecture), **routed(gate)).loss.backward()  # leaves its aux losses behind
    expected = logits(model, architecture, gate)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in copies:
        assert torch.equal(logits(other, architecture, gate), expected)
        contexts = {id(m.context) for m in other.modules() if isinstance(m, MoLoraLayer)}
        assert len(contexts) == 1 and id(model.base_model.context) not in contexts
        assert {id(other.base_model.context)} == contexts
    first = copies[0]
    first.add_expert("late")
    assert "late" not in model.expert_names and torch.equal(logits(model, architecture, gate), expected)
    with molora.routing(first, experts=["expert_0"]):
        assert torch.equal(logits(model, architecture, gate), expected)


# -- what is frozen stays frozen -----------------------------------------------------------------------


@two_architectures
def test_frozen_experts_stay_frozen(architecture, tmp_path):
    model = molora_model(architecture)
    model.freeze_experts(["expert_0", "expert_2"])
    expected = trainable(model)
    assert any("lora_A" in name for name in expected) and not any("frozen" in name for name in expected)
    model.add_adapter("second", config_for(architecture))
    model.set_adapter("second")
    assert not any(".default." in name for name in trainable(model))
    model.set_adapter("default")
    assert trainable(model) == expected
    with model.disable_adapter():
        pass
    assert trainable(model) == expected
    model.set_requires_grad("default", True)
    assert trainable(model) == expected
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(base_model(architecture), tmp_path, is_trainable=True)
    assert trainable(loaded) == expected
    assert loaded.trainable_experts == ["expert_1"]


def test_the_head_is_trained_saved_and_frozen_once_an_expert_is_added(tmp_path):
    model = molora_model("bert", num_experts=2, tasks=["alpha", "beta"])
    head = model.base_model.model.classifier.modules_to_save["default"]
    torch.nn.init.normal_(head.weight)
    assert head.weight.requires_grad
    model.add_expert("late", tasks=["gamma"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    for each in (model, loaded):
        each.set_adapter("default")
        with each.disable_adapter():
            pass
        assert not any("classifier" in name for name in trainable(each))
        assert any("lora_A" in name for name in trainable(each))


def test_molora_beside_an_ordinary_lora_in_the_same_process():
    lora = get_peft_model(base_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="has no molora adapter"):
        molora.aux_losses(lora)
    assert not molora.aux_losses(molora_model("llama"))

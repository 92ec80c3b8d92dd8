"""Every kind of expert keeps what the package promises: a new kind is one more line of REFERENCES."""

from __future__ import annotations

import copy
import functools
import itertools
import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import molora
from molora import GateConfig, MoLoraConfig
from molora.config.choices import KINDS
from molora.config.load import load_recipe
from molora.errors import AdapterError, ConfigError
from molora.experts.kinds.tensor_train import dims_of
from molora.training.optimizer import parameters_by_role
from molora.tuner.layer import MoLoraLayer
from tests.config.recipes import small
from tests.zoo import base_model, batch_for, config_for, gradients, molora_model, routed

GATES = ("soft-group", "top2-group", "task-table", "task-group", "constant-linear")
TARGETS = ["q_proj", "o_proj"]  # of one shape, as of PEFT's projections
ONE_BLOCK = r".*layers\.0\..*_proj"  # linears of every shape there is; the second block has the same


def lora_reference(base, banks):
    """The same expert of PEFT's own, and its Parameters by the name of our stack."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer, bank in zip(layers, banks, strict=True):
        expert = bank.expert(0)
        layer.lora_A["default"].weight.data.copy_(expert.A)
        layer.lora_B["default"].weight.data.copy_(expert.B)
    return model, [
        {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight} for layer in layers
    ]


def dora_reference(base, banks):
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True))
    layers, parts = [m for m in model.modules() if hasattr(m, "lora_A")], []
    for layer, bank in zip(layers, banks, strict=True):
        parts.append({"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight})
        parts[-1]["m"] = layer.lora_magnitude_vector["default"].weight
        for name, parameter in parts[-1].items():
            parameter.data.copy_(bank.stacks[name].whole[0])
    return model, parts


def adalora_model(base, banks, **settings):
    config = AdaLoraConfig(
        init_r=4, lora_alpha=8, target_modules=TARGETS, **{"total_step": 9, "target_r": 2, **settings}
    )
    model = get_peft_model(base, config).double()
    layers, parts = [m for m in model.modules() if hasattr(m, "lora_E")], []
    for layer, bank in zip(layers, banks, strict=True):
        layer.ranknum["default"].data.fill_(4 - 1e-5)  # PEFT adds it again
        layer.ranknum["default"].requires_grad_(False)
        parts.append({name: getattr(layer, f"lora_{name}")["default"] for name in "AEB"})
        for name, parameter in parts[-1].items():
            parameter.data.copy_(bank.stacks[name].whole[0].view(parameter.shape))
    return model, parts


def adalora_reference(base, banks):
    return adalora_model(base, banks, orth_reg_weight=0.0)


def vera_reference(base, banks):
    model = get_peft_model(base, VeraConfig(r=4, target_modules=TARGETS, d_initial=0.1)).double()
    layers = [m for m in model.modules() if hasattr(m, "vera_lambda_b")]
    parts = [{"b": m.vera_lambda_b["default"], "d": m.vera_lambda_d["default"]} for m in layers]
    for layer, part, bank in zip(layers, parts, banks, strict=True):
        assert torch.equal(layer.vera_A["default"], bank.stacks["A"].rows[0])
        assert torch.equal(layer.vera_B["default"].T, bank.stacks["B"].rows[0])
        for name, vector in part.items():
            vector.data.copy_(bank.stacks[name].rows[0])
    return model, parts


class Written(nn.Module):
    """A linear layer with one expert as its paper writes it; our scaling is 2."""

    def __init__(self, base, **parts):
        super().__init__()
        self.base = base
        for name, value in parts.items():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, x):
        return self.base(x) + 2.0 * x @ self.delta().T


class WrittenCore(Written):
    def delta(self):
        return self.B @ self.C @ self.A


class WrittenReLora(Written):
    def delta(self):
        return self.held_B @ self.held_A + self.B @ self.A


class WrittenTrain(Written):
    """The trains of LoRETTA, one number of the product after the other."""

    def delta(self):
        (d_out, d_in), rank = self.base.weight.shape, 4
        A = self.product(self.A, dims_of(d_in * rank)).view(d_in, rank)
        B = self.product(self.B, dims_of(d_out * rank)).view(d_out, rank)
        return B @ A.T

    @staticmethod
    def product(flat, dims, inner=5):
        ranks, start, cores = [1, *[inner] * (len(dims) - 1), 1], 0, []
        for left, dim, right in zip(ranks, dims, ranks[1:], strict=False):
            cores.append(flat[start : start + left * dim * right].view(left, dim, right))
            start += left * dim * right
        assert start == len(flat)
        numbers = []
        for index in itertools.product(*map(range, dims)):
            numbers.append(
                functools.reduce(torch.matmul, [c[:, i] for c, i in zip(cores, index, strict=True)])
            )
        return torch.cat(numbers)


def written_reference(layer_class, stacks):
    def make(base, banks):
        layers = []
        owners = [m for m in base.modules() if any(hasattr(m, target) for target in TARGETS)]
        places = [(owner, target) for owner in owners for target in TARGETS if hasattr(owner, target)]
        for (owner, target), bank in zip(places, banks, strict=True):
            rows = {name: bank.stacks[name].whole[0] for name in stacks}
            layers.append(layer_class(getattr(owner, target), **rows))
            setattr(owner, target, layers[-1])
        return base, [{name: getattr(layer, name) for name in stacks} for layer in layers]

    return make


# Kind -> (one expert of PEFT's, or as its paper writes it; the stacks that learn).
REFERENCES = {
    "lora": (lora_reference, {"A", "B"}),
    "lora_fa": (lora_reference, {"B"}),
    "vera": (vera_reference, {"d", "b"}),
    "dora": (dora_reference, {"A", "B", "m"}),
    "adalora": (adalora_reference, {"A", "E", "B"}),
    "bilora": (adalora_reference, {"A", "E", "B"}),
    "core": (written_reference(WrittenCore, "ABC"), {"A", "B", "C"}),
    "sparse": (lora_reference, {"A", "B"}),
    "relora": (written_reference(WrittenReLora, ("A", "B", "held_A", "held_B")), {"A", "B"}),
    "cola": (written_reference(WrittenReLora, ("A", "B", "held_A", "held_B")), {"A", "B"}),
    "tensor_train": (written_reference(WrittenTrain, "AB"), {"A", "B"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def test_every_kind_is_tested():
    assert set(REFERENCES) == set(KINDS)


def banks(model):
    return [m.molora_experts["default"] for m in model.modules() if isinstance(m, MoLoraLayer)]


@torch.no_grad()
def fill(model, seed=2):
    """Give every number that learns a random value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "molora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def model_of(kind, gate="soft-group", *, trained=True, **settings):
    model = molora_model("llama", gate, trained=False, kind=kind, **{"target_modules": ONE_BLOCK, **settings})
    if trained:
        fill(model)
    return model.eval()


def logits(model, gate="soft-group", **extra):
    return model(**batch_for("llama"), **{**routed(gate), **extra}).logits


def forced(model, *names, **extra):
    with molora.routing(model, experts=list(names)):
        return model(**batch_for("llama"), **extra).logits


# -- the mathematics -----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("gate", GATES)
def test_I1_untrained_experts_change_no_bit(kind, gate):
    model = model_of(kind, gate, trained=False)
    assert torch.equal(logits(model, gate), base_model("llama")(**batch_for("llama")).logits)


@kinds
def test_I3_one_expert_is_pefts_in_values_and_gradients(kind):
    settings = {"num_experts": 1, "gate": GateConfig(top_k=1), "tasks": None, "target_modules": TARGETS}
    model = model_of(kind, dtype=torch.float64, **settings)
    make, trained = REFERENCES[kind]
    reference, parts = make(base_model("llama", dtype=torch.float64), banks(model))
    batch = batch_for("llama")
    assert_close(model(**batch).logits, reference(**batch).logits, atol=1e-10, rtol=1e-10)
    model(**batch).loss.backward()
    reference(**batch).loss.backward()
    for bank, theirs in zip(banks(model), parts, strict=True):
        for name in trained:
            stack = bank.stacks[name]
            ours = stack.trainable.grad[0]
            as_saved = ours if stack.axes is None else ours.T
            assert_close(as_saved.view(theirs[name].shape), theirs[name].grad, atol=1e-10, rtol=1e-9)


@kinds
@pytest.mark.parametrize("gate", GATES)
def test_only_what_learns_has_gradients_and_all_of_it_has(kind, gate):
    model = model_of(kind, gate).train()
    model(**batch_for("llama"), **routed(gate)).loss.backward()
    stacks = REFERENCES[kind][1]
    for bank in banks(model):
        for name, stack in bank.stacks.items():
            assert all((block.grad is not None) == (name in stacks) for block in stack.blocks), name
    roles = parameters_by_role(model)
    assert len(roles["experts_A"] + roles["experts_B"]) == len(stacks) * len(banks(model))
    assert roles["experts_B"] and not roles["heads"]


@kinds
def test_I5_a_forced_expert_is_that_expert_merged(kind):
    model = model_of(kind, dtype=torch.float64)
    expected = forced(model, "expert_1")
    merged = model.merge_and_unload(expert_weights={"expert_1": 1.0})
    assert_close(merged(**batch_for("llama")).logits, expected, atol=1e-9, rtol=1e-9)


@kinds
@pytest.mark.parametrize("gate", ["task-table", "constant-linear"])
def test_I13_merging_a_static_mixture_is_exact_and_can_be_undone(kind, gate):
    model = model_of(kind, gate, dtype=torch.float64)
    ids = {"routing_task_ids": ["beta"] * 3} if gate.startswith("task") else {}
    expected, base = logits(model, gate, **ids), base_model("llama", dtype=torch.float64)
    model.merge_adapter(task="beta" if ids else None)
    assert_close(logits(model, gate, **ids), expected, atol=1e-9, rtol=1e-9)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, gate), base(**batch_for("llama")).logits)


@kinds
def test_I7_a_row_alone_is_the_row_in_a_batch(kind):
    model, batch = model_of(kind, "top2-group"), batch_for("llama", padding="right")
    together = model(**batch).logits
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        assert_close(model(**alone).logits[0], together[row], atol=2e-5, rtol=1e-4)


@kinds
@pytest.mark.parametrize("gate", ["top2-group", "task-group"])
def test_I8_cached_decoding_follows_the_parameters(kind, gate):
    model, prompt = model_of(kind, gate), {"input_ids": batch_for("llama")["input_ids"]}
    for seed in (2, 3):
        fill(model, seed)
        found = [
            model.generate(**prompt, max_new_tokens=4, do_sample=False, use_cache=cache, **routed(gate))
            for cache in (True, False)
        ]
        assert torch.equal(*found)


@kinds
def test_by_factors_and_over_whole_feed_forwards(kind):
    for settings in (
        {"combine": "factors", "gate": GateConfig(scope="task", score="table", select="dense")},
        {"ffn_targets": ["gate_proj", "up_proj", "down_proj"], "gate": GateConfig(top_k=2)},
    ):
        gate = settings.pop("gate")
        if kind == "dora":
            with pytest.raises(ConfigError, match=r"(combine|ffn_targets): .*dora"):
                MoLoraConfig(kind=kind, gate=gate, **settings)
            continue
        ids = {"routing_task_ids": ["alpha"] * 3} if gate.scope == "task" else {}
        tasks = {"tasks": {"alpha": ["expert_0", "expert_1"]}} if ids else {}
        model = model_of(kind, gate, dtype=torch.float64, **settings, **tasks)
        expected = forced(model, "expert_0", **ids)
        merged = model.merge_and_unload(expert_weights={"expert_0": 1.0})
        assert_close(merged(**batch_for("llama")).logits, expected, atol=1e-9, rtol=1e-9)


# -- growing, freezing ---------------------------------------------------------------------------------


@kinds
def test_I10_a_new_expert_leaves_the_old_ones_as_they_are(kind):
    model = model_of(kind, "task-group")
    before = logits(model, "task-group")
    model.add_expert("late", tasks=["delta"])
    late = {"routing_task_ids": ["delta"] * 3}
    assert torch.equal(logits(model, **late), base_model("llama")(**batch_for("llama")).logits)
    fill(model, 5)
    assert torch.equal(logits(model, "task-group"), before)
    model.train()(**batch_for("llama"), **late).loss.backward()
    assert gradients(model) and all(".lora_" in name for name in gradients(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(logits(model.eval(), "task-group"), before)
    assert not torch.equal(logits(model, **late), before)


@kinds
def test_a_copied_expert_is_its_source_and_a_removed_one_is_gone(kind):
    model = model_of(kind)
    expected = forced(model, "expert_1")
    model.add_expert("twin", init="copy:expert_1")
    assert_close(forced(model, "twin"), expected, atol=1e-6, rtol=1e-6)
    model.remove_expert("expert_0")
    assert_close(forced(model, "expert_1"), expected, atol=1e-6, rtol=1e-6)
    assert model.expert_names == ["expert_1", "expert_2", "twin"]


@kinds
def test_an_expert_from_the_mean_update_where_the_kind_can_hold_one(kind):
    model = model_of(kind, r=16)
    before = logits(model)
    means = [sum(e.delta() for e in bank.experts()) / 3 for bank in banks(model)]
    if KINDS[kind].imports or KINDS[kind].averages:
        with pytest.raises(ConfigError, match="cannot start from a weight update: "):
            model.add_expert("mean", init="mean")
        assert torch.equal(logits(model), before) and len(model.expert_names) == 3
        return
    model.add_expert("mean", init="mean")
    for bank, mean in zip(banks(model), means, strict=True):
        assert_close(bank.expert(3).delta(), mean, atol=1e-5, rtol=1e-4)


@kinds
def test_frozen_experts_stay_frozen_and_learn_again(kind):
    model = model_of(kind)
    before = [bank.expert(0) for bank in banks(model)]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    model.freeze_experts(["expert_0"])
    for mark in (lambda: model.set_adapter("default"), lambda: model.set_requires_grad("default", True)):
        mark()
        assert not any(p.requires_grad for n, p in model.named_parameters() if "frozen_" in n)
    model.train()(**batch_for("llama")).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    for bank, old in zip(banks(model), before, strict=True):
        assert torch.equal(bank.expert(0).A, old.A) and torch.equal(bank.expert(0).B, old.B)
    model.unfreeze_experts(["expert_0"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= {
        n for n in names if "lora_" in n
    }


# -- disk ----------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("how", ["plain", "meta", "transformers"])
def test_I9_loading_is_bit_equal(kind, how, tmp_path):
    model = model_of(kind)
    model.freeze_experts(["expert_1"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = base_model("llama", seed=0)
    torch.manual_seed(99)
    if how == "transformers":
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = PeftModel.from_pretrained(loaded, tmp_path, low_cpu_mem_usage=how == "meta")
    assert torch.equal(loaded.eval()(**batch_for("llama")).logits, expected)


@kinds
def test_a_checkpoint_takes_its_tensors_as_they_are(kind, tmp_path):
    weights = get_peft_model_state_dict(model_of(kind), save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "file")
    assert load_file(tmp_path / "file").keys() == weights.keys()


@kinds
def test_an_exported_expert_is_an_ordinary_lora(kind, tmp_path):
    model = model_of(kind, dtype=torch.float64)
    expected = forced(model, "expert_2")
    molora.export_lora(model, tmp_path / "out", expert="expert_2")
    loaded = PeftModel.from_pretrained(
        base_model("llama", dtype=torch.float64), tmp_path / "out", autocast_adapter_dtype=False
    )
    assert_close(loaded(**batch_for("llama")).logits, expected, atol=1e-9, rtol=1e-9)


@kinds
def test_an_ordinary_lora_becomes_an_expert_or_is_refused_with_a_reason(kind, tmp_path):
    source = model_of("lora", seed=4)
    molora.export_lora(source, tmp_path / "lora", expert="expert_0")
    model = model_of(kind)
    before = logits(model)
    for expert in ("expert_1", "new"):
        if KINDS[kind].imports is None:
            molora.import_lora(model, tmp_path / "lora", expert=expert)
            continue
        with pytest.raises(AdapterError, match="cannot become an expert of this mixture: "):
            molora.import_lora(model, tmp_path / "lora", expert=expert)
        assert torch.equal(logits(model), before) and len(model.expert_names) == 3
    if KINDS[kind].imports is None:
        for ours, theirs in zip(banks(model), banks(source), strict=True):
            assert_close(ours.expert(1).delta(), theirs.expert(0).delta())
            assert_close(ours.expert(3).delta(), theirs.expert(0).delta())


# -- the config ----------------------------------------------------------------------------------------


def test_an_unknown_kind_and_unknown_settings_name_the_nearest():
    with pytest.raises(ConfigError, match=r"kind: 'lorra' is not one of lora.* Did you mean 'lora'\?"):
        MoLoraConfig(kind="lorra")
    with pytest.raises(
        ConfigError, match=r"kind_settings.rank: not a setting of kind 'lora'. Its settings: none"
    ):
        MoLoraConfig(kind_settings={"rank": 1})
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        load_recipe({**small(), "adapter": {**small()["adapter"], "kind": "lorra"}})


def test_a_config_without_a_kind_is_lora_and_is_written_as_before_there_were_kinds():
    config = config_for("llama").to_dict()
    assert not {"kind", "kind_settings"} & config.keys()  # adapters of LoRAs are written as they always were
    known = {key: value for key, value in config.items() if key in MoLoraConfig.__dataclass_fields__}
    assert MoLoraConfig(**known).kind == "lora" and MoLoraConfig(**known).kind_settings == {}
    assert config_for("llama", kind="vera").to_dict()["kind"] == "vera"


@kinds
def test_what_goes_with_lora_only_is_refused_elsewhere(kind):
    for settings in ({"share_A": True}, {"init": "svd_segments"}, {"aux_losses": {"orthogonal": 1.0}}):
        if kind == "lora":
            MoLoraConfig(kind=kind, **settings)
            continue
        with pytest.raises(ConfigError, match="kind: lora"):
            MoLoraConfig(kind=kind, **settings)


# -- projections that are drawn again ------------------------------------------------------------------


def test_projections_are_one_tensor_for_all_layers_of_a_shape_and_are_not_saved(tmp_path):
    model = copy.deepcopy(model_of("vera", r=16, target_modules="all-linear")).double()
    model.add_expert("late")
    by_shape = {}
    for bank in banks(model):
        for name in "AB":
            (block,) = bank.stacks[name].blocks
            by_shape.setdefault((name, bank.stacks["A"].rows.shape, bank.stacks["B"].rows.shape), set()).add(
                id(block)
            )
    assert all(len(objects) == 1 for objects in by_shape.values()) and len(by_shape) < 2 * len(banks(model))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape for name, tensor in saved.items() if name.endswith((".A", ".B"))} == {(32,)}


@pytest.mark.parametrize("how", ["plain", "meta", "transformers"])
def test_projections_of_another_key_are_never_used_without_notice(how, tmp_path):
    model_of("vera").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["kind_settings"] = {"projection_prng_key": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "MANIFEST.json").unlink()
    with pytest.raises(AdapterError, match="projections"):
        if how == "transformers":
            base_model("llama").load_adapter(str(tmp_path))
        else:
            PeftModel.from_pretrained(base_model("llama"), tmp_path, low_cpu_mem_usage=how == "meta")


def test_settings_of_a_kind_are_checked():
    with pytest.raises(ConfigError, match=r"kind_settings.d_inital: .* Did you mean 'd_initial'\?"):
        MoLoraConfig(kind="vera", kind_settings={"d_inital": 0.2})
    with pytest.raises(ConfigError, match=r"must be a whole number, not 0\.5"):
        MoLoraConfig(kind="vera", kind_settings={"projection_prng_key": 0.5})
    with pytest.raises(ConfigError, match="experts with one A have one rank"):
        MoLoraConfig(kind="vera", expert_specs={"expert_0": {"r": 2, "lora_alpha": 2}})
    assert (
        MoLoraConfig(kind="vera").scaling == 1.0
        and MoLoraConfig(kind="vera", use_rslora=True).scaling is None
    )
    bank = banks(model_of("vera", trained=False, kind_settings={"d_initial": 0.5}))[0]
    assert torch.equal(bank.stacks["d"].rows, torch.full((3, 4), 0.5)) and not bank.stacks["b"].rows.any()


# -- magnitudes of the whole weight -------------------------------------------------------------------


def test_a_mixture_of_dora_is_the_sum_of_decomposed_weights():
    model = model_of("dora", "constant-linear", dtype=torch.float64)
    bank, layer = banks(model)[0], next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    weight, x = layer.get_base_weight(), torch.randn(5, 16, dtype=torch.float64)
    gate = model.base_model.model.model.layers[0].self_attn.q_proj.mounts["default"].gate
    weights = torch.softmax(gate.rows.weight.flatten(), 0)
    expected = torch.zeros(5, len(weight), dtype=torch.float64)
    for w, (rows, _, scaling) in zip(weights, bank.rows(), strict=True):
        direction = weight + scaling * rows["B"].T @ rows["A"]
        expected += w * x @ (rows["m"] / direction.norm(dim=1) * direction.T)
    assert_close(layer(x), expected, atol=1e-9, rtol=1e-9)


def test_a_static_mixture_of_dora_is_exported_as_one_dora_beside_ordinary_loras(tmp_path):
    model = model_of("dora", "task-table", dtype=torch.float64, plain_targets=["down_proj"])
    expected = logits(model, "task-table", routing_task_ids=["beta"] * 3)
    for fold in (False, True):
        molora.export_lora(model, tmp_path / str(fold), task="beta", fold_scaling=fold)
        base = base_model("llama", dtype=torch.float64)
        loaded = PeftModel.from_pretrained(base, tmp_path / str(fold), autocast_adapter_dtype=False)
        assert loaded.peft_config["default"].use_dora
        assert_close(loaded(**batch_for("llama")).logits, expected, atol=1e-9, rtol=1e-9)


def test_dora_on_conv1d_with_biases_merges_exactly_and_survives_half_precision():
    model = molora_model("gpt2", "task-table", trained=False, kind="dora", dtype=torch.float64)
    fill(model)
    model.eval()
    expected = model(**batch_for("gpt2"), **routed("task-table")).logits
    alone = [
        model(**{k: v[i : i + 1] for k, v in batch_for("gpt2").items()}, routing_task_ids=[t]).logits
        for i, t in enumerate(routed("task-table")["routing_task_ids"])
    ]
    assert_close(torch.cat(alone), expected, atol=1e-9, rtol=1e-9)
    first = routed("task-table")["routing_task_ids"][0]
    merged = model.merge_and_unload(task=first)
    assert_close(merged(**batch_for("gpt2")).logits[0], expected[0], atol=1e-9, rtol=1e-9)
    base = base_model("gpt2", dtype=torch.bfloat16)
    plain = base(**batch_for("gpt2")).logits
    for autocast in (True, False):  # experts in float32, and in the base's dtype
        half = get_peft_model(
            copy.deepcopy(base), config_for("gpt2", kind="dora"), autocast_adapter_dtype=autocast
        )
        assert torch.equal(half.eval()(**batch_for("gpt2")).logits, plain)


class Packed(nn.Linear):
    """A layer whose weight is whole numbers, which nobody can read."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        del self.weight
        self.weight = nn.Parameter(linear.weight.mul(100).to(torch.int8), requires_grad=False)


def test_dora_names_the_layer_whose_weight_it_cannot_read():
    base = base_model("llama")
    attention = base.model.layers[0].self_attn
    attention.q_proj = Packed(attention.q_proj)
    with pytest.raises(ConfigError, match=r"kind: dora .*layers\.0\.self_attn\.q_proj \(Packed\)"):
        get_peft_model(base, config_for("llama", kind="dora"))


def test_dora_stands_alone_where_several_adapters_are_active():
    model = model_of("dora", num_experts=1, gate=GateConfig(top_k=1), tasks=None)
    model.add_adapter("other", MoLoraConfig(num_experts=1, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="kind dora scale the base's output"):
        model(**batch_for("llama"))
    with pytest.raises(ConfigError, match="kind dora scale the base's output"):
        model.merge_adapter(["default", "other"])


def test_dora_follows_its_scaling():
    model = model_of("dora", "task-group", dtype=torch.float64)
    with molora.rescale_adapter_scale(model, 0.5):
        expected = logits(model, "task-group")
        merged = copy.deepcopy(model).merge_and_unload(task="alpha")
        assert_close(merged(**batch_for("llama")).logits[0], expected[0], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(logits(model, "task-group"), expected)

"""LoRA in and out: stock PEFT is the oracle in both directions."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import molora
from molora.errors import AdapterError, ConfigError
from molora.tuner.config import ExpertSpec
from tests.zoo import ARCHITECTURES, TASK_TYPES, base_model, batch_for, molora_model, randomise, routed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def assert_same(actual, expected, *, folded=False):
    """Equal up to float64 sums; where numbers were multiplied into B, up to B's float32 rounding."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 if folded else 1e-9)


@torch.no_grad()
def logits(model, architecture, **kwargs):
    """In float64, so that a difference is one of the numbers in the file and not of the order of sums."""
    return model.double()(**batch_for(architecture), **kwargs).logits


def forced(model, architecture, experts):
    with molora.routing(model, experts=experts):
        ids = {} if model.peft_config["default"].gate.scope != "task" else routed("task")
        return logits(model, architecture, **ids)


def stock(architecture, folder):
    """The export in stock PEFT, molora's own method not involved."""
    model = PeftModel.from_pretrained(base_model(architecture), folder)
    assert isinstance(model.peft_config["default"], LoraConfig)
    return model.eval()


def stock_lora(architecture, folder, seed=3, **settings):
    """A LoRA as stock PEFT trains and saves it, and its logits."""
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": TASK_TYPES[architecture],
    }
    torch.manual_seed(seed)
    model = get_peft_model(base_model(architecture), LoraConfig(**{**defaults, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return logits(model, architecture)


# -- export -------------------------------------------------------------------------------------------


SCALINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "number": {"scaling": 0.7},
    "patterns": {"rank_pattern": {"1.*": 2}, "alpha_pattern": {"0.*": 3.5}},
    "spec": {"expert_specs": {"expert_1": ExpertSpec(r=6, lora_alpha=5, use_rslora=True)}},
}


@pytest.mark.parametrize(
    ("architecture", "settings", "fold"),
    [
        *(("llama", settings, fold) for settings in SCALINGS for fold in (False, True)),
        # Patterns meet names of linears; all else is the same on every architecture.
        *((a, "patterns", fold) for a in ARCHITECTURES[1:] for fold in (False, True)),
        ("gpt2", "plain", False), ("bert", "rslora", False), ("t5", "spec", True),
    ],
)  # fmt: skip
def test_an_expert_in_stock_peft_is_the_expert_forced(architecture, settings, fold, tmp_path):
    model = molora_model(architecture, **SCALINGS[settings])
    molora.export_lora(model, tmp_path / "e", expert="expert_1", fold_scaling=fold)
    want = forced(model, architecture, ["expert_1"])
    assert (want - logits(base_model(architecture), architecture)).abs().max() > 1e-3
    assert_same(logits(stock(architecture, tmp_path / "e"), architecture), want, folded=fold)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fixed_mixtures_are_one_lora_of_the_summed_rank(architecture, tmp_path):
    weights = {"expert_0": 0.25, "expert_2": -1.5}
    model = molora_model(architecture, rank_pattern={"1.*": 2})
    molora.export_lora(model, tmp_path / "e", weights=weights)
    exported = stock(architecture, tmp_path / "e")
    assert_same(logits(exported, architecture), forced(model, architecture, weights), folded=True)
    ranks = {p.shape[0] for name, p in exported.named_parameters() if "lora_A" in name}
    assert ranks == {4, 8}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_task_of_a_task_gate(architecture, tmp_path):
    tasks = {"alpha": ["expert_0"], "beta": {"expert_1": 0.7, "expert_2": 0.3}}
    model = molora_model(architecture, "task-group", tasks=tasks)
    for task in tasks:
        molora.export_lora(model, tmp_path / task, task=task)
        want = logits(model, architecture, routing_task_ids=[task] * 3)
        assert_same(logits(stock(architecture, tmp_path / task), architecture), want, folded=task == "beta")


def test_a_constant_gate_needs_no_choice_and_its_gates_may_differ(tmp_path):
    model = molora_model("llama", "constant-linear")
    molora.export_lora(model, tmp_path / "e")
    assert_same(logits(stock("llama", tmp_path / "e"), "llama"), logits(model, "llama"), folded=True)


def test_plain_loras_go_along(tmp_path):
    model = molora_model("llama", target_modules=["q_proj", "v_proj"], plain_targets=["o_proj"])
    molora.export_lora(model, tmp_path / "e", expert="expert_2")
    exported = stock("llama", tmp_path / "e")
    assert_same(logits(exported, "llama"), forced(model, "llama", ["expert_2"]))
    config = json.loads((tmp_path / "e" / CONFIG).read_text())
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj", "v_proj"]


def test_folding_leaves_what_simple_engines_read(tmp_path):
    model = molora_model("llama", use_rslora=True, rank_pattern={"1.*": 2}, alpha_pattern={"0.*": 3})
    molora.export_lora(model, tmp_path / "e", expert="expert_0", fold_scaling=True)
    config = json.loads((tmp_path / "e" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "e" / WEIGHTS)
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {4}


def test_alpha_is_an_integer_where_it_is_one(tmp_path):
    for alpha, kind in ((16.0, int), (0.5, float)):
        model = molora_model("llama", lora_alpha=alpha)
        molora.export_lora(model, tmp_path / "e", expert="expert_0")
        assert type(json.loads((tmp_path / "e" / CONFIG).read_text())["lora_alpha"]) is kind


@pytest.mark.parametrize(
    ("gate", "choice", "message"),
    [
        ("top2-group", {}, "depend on the input"),
        ("top2-group", {"task": "alpha"}, "depend on the input"),
        ("task-group", {}, "depend on the task id"),
        ("top2-group", {"expert": "expert_9"}, "unknown expert"),
        ("top2-group", {"weights": {}}, "weight 0"),
        ("top2-group", {"expert": "expert_0", "weights": {"expert_1": 1.0}}, "give one of"),
    ],
)
def test_what_cannot_be_exported_writes_nothing(gate, choice, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        molora.export_lora(molora_model("llama", gate), tmp_path / "e", **choice)
    assert list(tmp_path.iterdir()) == []


# -- import -------------------------------------------------------------------------------------------

LORAS = {
    "same": {},
    "rslora": {"use_rslora": True},
    "wide": {"r": 9, "lora_alpha": 5},
    "narrow": {"r": 1},
    "patterns": {"rank_pattern": {"0.*": 2}, "alpha_pattern": {"1.*": 3}},
}


@pytest.mark.parametrize(
    ("architecture", "lora", "expert"),
    [
        *(("llama", lora, expert) for lora in LORAS for expert in ("expert_1", "legal")),
        *((a, "patterns", expert) for a in ARCHITECTURES[1:] for expert in ("expert_1", "legal")),
        ("gpt2", "same", "legal"), ("bert", "wide", "expert_1"), ("t5", "narrow", "legal"),
    ],
)  # fmt: skip
def test_round_trip_with_stock_peft(architecture, lora, expert, tmp_path):
    want = stock_lora(architecture, tmp_path / "in", **LORAS[lora])
    model = molora_model(architecture)
    if architecture == "bert":
        with pytest.warns(UserWarning, match="heads belong to the model"):
            done = molora.import_lora(model, tmp_path / "in", expert=expert)
        assert done.skipped == ("classifier.bias", "classifier.weight")
    else:
        done = molora.import_lora(model, tmp_path / "in", expert=expert)
        assert done.skipped == ()
    assert (
        done.layers > 0
        and (expert in model.expert_names)
        and len(model.expert_names) == 3 + (expert == "legal")
    )
    assert_same(forced(model, architecture, [expert]), want)

    molora.export_lora(model, tmp_path / "out", expert=expert)
    before, after = load_file(tmp_path / "in" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(stock(architecture, tmp_path / "out"), architecture), want)


def test_importing_leaves_the_other_experts_and_survives_saving(tmp_path):
    stock_lora("llama", tmp_path / "in", r=9)
    model = molora_model("llama", "task-group")
    before = [logits(model, "llama", routing_task_ids=[task] * 3) for task in ("alpha", "gamma")]
    molora.import_lora(model, tmp_path / "in", expert="expert_1")
    molora.import_lora(model, tmp_path / "in", expert="legal", tasks=["law"])
    after = [logits(model, "llama", routing_task_ids=[task] * 3) for task in ("alpha", "gamma")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    want = [logits(model, "llama", routing_task_ids=[task] * 3) for task in ("beta", "law")]
    assert_same(*want)
    loaded = molora.load(base_model("llama"), molora.save(model, tmp_path / "saved"))
    got = [logits(loaded, "llama", routing_task_ids=[task] * 3) for task in ("beta", "law")]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_layers_the_lora_does_not_cover_add_nothing(tmp_path):
    want = stock_lora("llama", tmp_path / "in", target_modules=["q_proj", "layers.1.mlp.down_proj"])
    model = molora_model("llama")
    molora.import_lora(model, tmp_path / "in", expert="expert_0")
    torch.testing.assert_close(forced(model, "llama", ["expert_0"]), want)
    molora.export_lora(model, tmp_path / "out", expert="expert_0")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(tmp_path / "in" / WEIGHTS).keys()
    assert torch.equal(logits(stock("llama", tmp_path / "out"), "llama"), want)


@pytest.mark.parametrize("expert", ["expert_1", "legal"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_dora_comes_into_experts_of_that_kind_with_its_magnitudes(
    architecture, expert, use_rslora, tmp_path
):
    want = stock_lora(architecture, tmp_path / "in", use_dora=True, use_rslora=use_rslora, r=2)
    model = molora_model(architecture, "soft-linear", kind="dora")
    molora.import_lora(model, tmp_path / "in", expert=expert)
    assert_same(forced(model, architecture, [expert]), want, folded=True)  # norms are of float32 rows
    molora.export_lora(model, tmp_path / "out", expert=expert)
    assert_same(logits(stock(architecture, tmp_path / "out"), architecture), want, folded=True)
    molora.save(model, tmp_path / "saved")
    again = molora.load(base_model(architecture), tmp_path / "saved")
    assert torch.equal(forced(again, architecture, [expert]), forced(model, architecture, [expert]))


def test_a_dora_without_its_magnitudes_is_refused(tmp_path):
    stock_lora("llama", tmp_path / "in", use_dora=True)
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    del tensors[next(name for name in tensors if "magnitude" in name)]
    save_file(tensors, tmp_path / "in" / WEIGHTS)
    model = molora_model("llama", "soft-linear", kind="dora")
    with pytest.raises(AdapterError, match="has no magnitude for each of its"):
        molora.import_lora(model, tmp_path / "in", expert="legal")


def test_an_imported_expert_trains(tmp_path):
    stock_lora("llama", tmp_path / "in", r=2)
    model = molora_model("llama", "soft-group", num_experts=1, tasks=["only"])
    molora.import_lora(model, tmp_path / "in", expert="expert_0")
    model(**batch_for("llama")).loss.backward()
    trained = [p for name, p in model.named_parameters() if "molora_experts" in name]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA rescales"),
        ({"bias": "all"}, "biases of the base"),
        ({"bias": "lora_only"}, "biases of the base"),
        ({"lora_bias": True}, "biases"),
        ({"target_parameters": ["x"]}, "bare parameters"),
        ({"trainable_token_indices": [1]}, "embedding rows"),
        ({"layer_replication": [[0, 2]]}, "number of layers"),
        ({"alora_invocation_tokens": [1]}, "invocation tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "method changed"),
        ({"from_the_future": 3}, "not a setting"),
        ({"peft_type": "IA3"}, "'IA3' adapter"),
        ({"r": 5}, "rank 4, but its config says 5"),
        ({"r": None}, "expected a positive number"),
    ],
)
def test_what_is_not_an_ordinary_lora_is_refused_with_the_reason(changes, message, tmp_path):
    stock_lora("llama", tmp_path / "in")
    edit_config(tmp_path / "in", **changes)
    model = molora_model("llama")
    before = logits(model, "llama")
    with pytest.raises(AdapterError, match=message):
        molora.import_lora(model, tmp_path / "in", expert="legal")
    assert len(model.expert_names) == 3 and torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, k: {**t, k.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)},
            "not a factor",
        ),
        (lambda t, k: {name: v for name, v in t.items() if name != k}, "has lora_B only"),
        (lambda t, k: {**t, k: torch.full_like(t[k], float("nan"))}, "not finite"),
        (lambda t, k: {**t, k: t[k][:, :-1].clone()}, "maps 31 to 16, the layer 32"),
        (
            lambda t, k: {name.replace("q_proj", "w_proj"): v for name, v in t.items()},
            "has no experts in this mixture",
        ),
        (
            lambda t, k: {"x.lora_A.weight": torch.ones(2, 3, 4), "x.lora_B.weight": torch.ones(2, 2)},
            "do not fit",
        ),
        (lambda t, k: {}, "no factors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    stock_lora("llama", tmp_path / "in")
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    save_file(change(tensors, next(name for name in tensors if "lora_A" in name)), tmp_path / "in" / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        molora.import_lora(molora_model("llama"), tmp_path / "in", expert="expert_0")


def test_modules_without_experts_are_refused(tmp_path):
    stock_lora("llama", tmp_path / "in")
    model = molora_model("llama", target_modules=["q_proj"], plain_targets=["v_proj"])
    with pytest.raises(AdapterError, match=r"(?s)down_proj: has no experts.* and \d+ more"):
        molora.import_lora(model, tmp_path / "in", expert="expert_0")


def test_damaged_and_pickled_folders(tmp_path):
    stock_lora("llama", tmp_path / "in")
    data = (tmp_path / "in" / WEIGHTS).read_bytes()
    (tmp_path / "in" / WEIGHTS).write_bytes(data[:100])
    with pytest.raises(AdapterError, match="damaged"):
        molora.import_lora(molora_model("llama"), tmp_path / "in", expert="expert_0")
    (tmp_path / "in" / WEIGHTS).rename(tmp_path / "in" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="only safetensors"):
        molora.import_lora(molora_model("llama"), tmp_path / "in", expert="expert_0")
    with pytest.raises(AdapterError, match="is missing"):
        molora.import_lora(molora_model("llama"), tmp_path / "none", expert="expert_0")


def test_a_head_trained_with_the_mixture_is_exported(tmp_path):
    model = molora_model("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    randomise(model, 4)
    molora.export_lora(model, tmp_path / "e", expert="expert_0")
    assert_same(logits(stock("bert", tmp_path / "e"), "bert"), forced(model, "bert", ["expert_0"]))

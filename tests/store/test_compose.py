"""Mixtures of ordinary LoRAs: exactly theirs under a one-hot gate, frozen, and gated in every way."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

import molora
from molora import AdapterError, ConfigError
from molora.gates.gate import Gate
from molora.gates.prototypes import arrow
from molora.tuner.fit_gate import one_expert
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, batch_for, gradients

LORAS = {
    "words": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "sums": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "code": {"r": 16, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "rank_pattern": {"o_proj": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Three stock PEFT LoRAs of differing ranks, scalings and targets, and each one's logits."""
    root, folders, logits = tmp_path_factory.mktemp("loras"), {}, {}
    for i, (name, options) in enumerate(LORAS.items()):
        base = base_model("llama", dtype=torch.float64)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        torch.manual_seed(i)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
        folders[name], logits[name] = str(root / name), model(**batch_for("llama")).logits
    return folders, logits


def composed(loras, **options):
    return molora.compose(base_model("llama", dtype=torch.float64), loras[0], **options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": {"kind": "soft", "share": "linear"}},
        {"gate": "constant"},
        {"preset": "xlora"},
        {"preset": "arrow", "fit": "arrow"},
        {"preset": "meteora"},
        {"preset": "phatgoose", "fit": "uniform"},
        {"gate": {"scope": "task"}},
    ],
    ids=str,
)
def test_a_one_hot_gate_gives_each_lora_exactly(loras, options):
    if options.get("gate") == "constant":
        options = {"gate": {"kind": "constant"}}
    model = composed(loras, **options)
    for name, expected in loras[1].items():
        with molora.routing(model, experts=[name]):
            assert torch.equal(model(**batch_for("llama")).logits, expected)
        if options.get("gate") == {"scope": "task"}:
            ids = {"routing_task_ids": name}
            assert torch.equal(model(**batch_for("llama"), **ids).logits, expected)


def test_only_the_gate_learns(loras):
    model = composed(loras, preset="xlora").train()
    model(**batch_for("llama")).loss.backward()
    assert gradients(model)
    assert all("molora_gate" in name for name in gradients(model))
    assert model.trainable_experts == []
    model.add_expert("fresh")
    assert model.trainable_experts == ["fresh"]


def test_saved_and_loaded_is_bit_equal(loras, tmp_path):
    model, batch = composed(loras, preset="arrow", fit="arrow"), batch_for("llama")
    molora.save(model, tmp_path / "mix")
    again = molora.load(base_model("llama", dtype=torch.float64), tmp_path / "mix")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    molora.export_lora(again, tmp_path / "words", expert="words")
    exported = molora.compose(base_model("llama", dtype=torch.float64), {"words": tmp_path / "words"})
    assert torch.equal(exported.eval()(**batch).logits, loras[1]["words"])


def test_arrow_rows_are_the_main_directions(loras):
    model = composed(loras, preset="arrow", fit="arrow")
    for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
        rows = layer.molora_gate["default"].rows.weight
        expected = arrow(layer.molora_experts["default"].experts())
        assert_close(rows, expected.to(rows.dtype))
        assert_close(rows.norm(dim=1), (rows.norm(dim=1) > 0).to(rows.dtype))


def test_average_rows_are_mean_inputs_without_padding(loras):
    data = {name: [batch_for("llama", seed=i, padding="right")] for i, name in enumerate(LORAS)}
    model = composed(loras, preset="phatgoose", fit="average", data=data)
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    for i, name in enumerate(LORAS):
        seen = []
        handle = layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with molora.routing(model, experts=[name]):
            model(**data[name][0])
        handle.remove()
        kept = seen[0][data[name][0]["attention_mask"].bool()]
        assert_close(layer.molora_gate["default"].rows.weight[i].float(), kept.mean(0).float())


def test_phatgoose_rows_lower_the_loss_of_each_experts_own_data(loras):
    batch = batch_for("llama")
    data = {name: [batch] for name in LORAS}
    model = composed(loras, preset="phatgoose")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def alone(index):
        gates = [m for m in model.modules() if isinstance(m, Gate)]
        with one_expert(dict.fromkeys(gates, index)), torch.no_grad():
            return model(**batch).loss.item()

    molora.fit_gate(model, "uniform")
    start = [alone(i) for i in range(3)]
    molora.fit_gate(model, "phatgoose", data, steps=30, lr=5e-2)
    assert [alone(i) < start[i] for i in range(3)] == [True] * 3
    for name, parameter in model.named_parameters():
        assert "molora_gate" in name or torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == before[name].requires_grad, name


def test_phatgoose_learns_at_the_released_rate(loras, monkeypatch):
    """5e-3 after a warm-up over 6 of 100 steps, constant from there on."""
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    molora.fit_gate(composed(loras, preset="phatgoose"), "phatgoose", {"words": [batch_for("llama")]})
    assert rates == pytest.approx([5e-3 * min(1, i / 6) for i in range(1, 101)])


def test_uniform_rows_weight_all_experts_alike(loras):
    model, batch = (
        composed(loras, gate={"kind": "soft", "share": "linear"}, fit="uniform"),
        batch_for("llama"),
    )
    equal = model(**batch).logits
    with molora.routing(model, experts=list(LORAS)):
        assert_close(model(**batch).logits, equal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 4}, "num_experts follow"),
        ({"fit": "arow"}, "Did you mean 'arrow'"),
        ({"fit": "average", "preset": "phatgoose"}, "needs data"),
        ({"fit": "arrow", "gate": {"kind": "soft", "share": "group"}}, "one linear each"),
        ({"fit": "arrow", "preset": "xlora"}, "gates that read tokens"),
        ({"fit": "phatgoose", "preset": "phatgoose", "data": {"wrds": []}}, "Did you mean 'words'"),
        ({"fit": "phatgoose", "preset": "phatgoose", "data": {"words": []}}, "no batches"),
    ],
)
def test_what_cannot_be_composed_is_refused(loras, options, message):
    with pytest.raises(ConfigError, match=message):
        composed(loras, **options)


def test_a_lora_of_another_base_is_refused(loras, tmp_path):
    with pytest.raises(AdapterError, match="does not fit this base"):
        molora.compose(base_model("gpt2"), loras[0])
    with pytest.raises(ConfigError, match="at least one"):
        molora.compose(base_model("llama"), {})
    with pytest.raises(AdapterError):
        molora.compose(base_model("llama"), {"x": tmp_path / "nowhere"})


def test_the_allocation_of_a_model_is_a_list_for_num_experts():
    found = molora.expert_allocation(base_model("llama"), 7)
    assert sum(found) == 7 and len(found) == 2
    assert molora.expert_allocation(base_model("llama"), 8, beta=0.0) == [4, 4]
    molora.MoLoraConfig(num_experts=found, target_modules="all-linear")
    with pytest.raises(ConfigError, match="every block"):
        molora.expert_allocation(base_model("llama"), 8, target_modules=["lm_head"])

"""bitsandbytes bases on CPU (NF4, int8): train, save, reload bit-equal, merge; skipped without bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from molora.config.choices import KINDS
from molora.tuner.layer import MoLoraLayer
from tests.zoo import base_model, batch_for, config_for, gradients, randomise, routed

bnb = pytest.importorskip("bitsandbytes")

# Merging rounds the weight again (4 bits do so coarsely): by how much, at most, relative to its norm.
BASES = {
    "nf4": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.5),
    "nf4-double": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        0.5,
    ),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), 0.012),
}
quantised = pytest.mark.parametrize("base", BASES)


@pytest.fixture
def load(tmp_path):
    """Loads a quantised copy of the tiny Llama, the same one each time."""
    folder = tmp_path / "base"
    base_model("llama").save_pretrained(folder)

    def from_disk(base):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BASES[base][0])
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # Else an AVX512-BF16 CPU repacks the weights at the first evaluation, and training is over.
                module.support_avx512bf16_for_cpu = False
        return model.eval()

    return from_disk


def wrapped(base, gate, **overrides):
    torch.manual_seed(1)
    model = get_peft_model(base, config_for("llama", gate, **overrides))
    randomise(model, 2)
    return model.eval()


@torch.no_grad()
def logits(model, **ids):
    return model.eval()(**batch_for("llama"), **ids).logits


@quantised
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("gate", ["top2-group", "task-group"])
def test_training_saving_and_reloading(load, base, gate, checkpointing, tmp_path):
    prepared = prepare_model_for_kbit_training(
        load(base), checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = wrapped(prepared, gate).train()
    backends = {layer.quantization_backend for layer in model.modules() if isinstance(layer, MoLoraLayer)}
    assert None not in backends
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch_for("llama"), **routed(gate)).loss
        loss.backward()
        assert all(g.isfinite().all() for g in gradients(model).values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    fresh = prepare_model_for_kbit_training(load(base), use_gradient_checkpointing=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(loaded, **routed(gate)), logits(model, **routed(gate)))


@quantised
def test_disabled_and_base_only_are_the_quantised_base(load, base):
    expected = logits(load(base))
    model = wrapped(load(base), "task-group")
    assert torch.equal(logits(model, routing_task_ids=[None] * 3), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@quantised
def test_merged_weights_are_the_experts_but_for_rounding(load, base):
    model = wrapped(load(base), "task-group")
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    expected = logits(model, routing_task_ids=["beta"] * 3)
    wanted = [m.get_base_weight() + m.molora_experts["default"].delta([0.0, 1.0, 0.0]) for m in layers]
    model.merge_adapter(task="beta")
    for layer, weight in zip(layers, wanted, strict=True):
        assert (layer.get_base_weight() - weight).norm() < BASES[base][1] * weight.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model, routing_task_ids=["beta"] * 3), expected)
    merged = model.merge_and_unload(task="beta")
    assert not torch.allclose(logits(merged), logits(load(base)), atol=0.1)


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        pytest.param(base, kind, marks=() if (base, kind) == ("int8", "dora") else pytest.mark.slow)
        for base in BASES
        for kind in KINDS
    ],
)
def test_every_kind_learns_is_merged_and_taken_out_again(load, base, kind):
    losses = {"aux_losses": {"orthonormal": 0.1}} if KINDS[kind].orthonormal else {}
    prepared = prepare_model_for_kbit_training(load(base), use_gradient_checkpointing=False)
    model = wrapped(prepared, "constant-linear", kind=kind, num_experts=2, tasks=[], **losses).train()
    model(**batch_for("llama")).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    before = logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert (logits(model) - before).norm() <= (0.05 if base == "int8" else 0.5) * before.norm()
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)

"""Sparse experts: which numbers are kept by each score, that the others stay zero, and how masks are saved and drawn."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

import molora
from molora import GateConfig, MoLoraConfig
from molora.errors import ConfigError
from molora.experts.kinds.sparse import gradient_flow, packed, unpacked
from molora.tuner.after_step import kind_states, restore_kinds
from tests.experts.test_kinds import TARGETS, banks, fill
from tests.zoo import base_model, batch_for, config_for

ALONE = {"num_experts": 1, "gate": GateConfig(top_k=1), "tasks": None, "target_modules": TARGETS}


def sparse(filled=True, settings=None, **changes):
    torch.manual_seed(0)
    settings = {"keep": 0.25, "after": 1, **(settings or {})}
    config = config_for("llama", kind="sparse", kind_settings=settings, **changes)
    model = get_peft_model(base_model("llama", dtype=torch.float64), config).double().train()
    if filled:
        fill(model)
    return model


def loss_of(model):
    return model(**batch_for("llama")).loss


def trained(model, steps, start=0, optimizer=None):
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(own, lr=0.02, weight_decay=0.1)
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        molora.after_step(model, step, steps, lambda: loss_of(model))
    return optimizer


def masks(model):
    """Of each bank: (expert, rank, d) of A and of B."""
    return [
        {n: unpacked(bank.stacks[f"mask_{n}"].rows, bank.stacks[n].rows.shape[-1]) for n in "AB"}
        for bank in banks(model)
    ]


@pytest.mark.parametrize("n", [1, 8, 19])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masks_are_bytes_that_every_dtype_holds(n, dtype):
    mask = torch.rand(3, 4, n) < 0.5
    numbers = packed(mask).to(dtype)
    assert numbers.shape == (3, 4, math.ceil(n / 8)) and torch.equal(unpacked(numbers, n) == 1, mask)


@pytest.mark.parametrize("scores", ["magnitude", "snip", "random"])
def test_the_best_of_each_factor_of_each_expert_are_kept(scores):
    model = sparse(settings={"scores": scores}, r=[4, 3])
    loss_of(model).backward()
    before = [{n: bank.stacks[n].trainable.detach().clone() for n in "AB"} for bank in banks(model)]
    grads = [{n: bank.stacks[n].trainable.grad for n in "AB"} for bank in banks(model)]
    molora.after_step(model)
    for bank, old, grad, mask in zip(banks(model), before, grads, masks(model), strict=True):
        for expert, rank in enumerate(bank.ranks):
            for n in "AB":
                w, g, kept = old[n][expert, :rank], grad[n][expert, :rank], mask[n][expert, :rank]
                assert kept.sum() == round(0.25 * w.numel()) and not mask[n][expert, rank:].any()
                if scores != "random":
                    found = (w if scores == "magnitude" else w * g).abs().flatten()
                    threshold = found.sort(descending=True).values[int(kept.sum()) - 1]
                    assert torch.equal(kept.flatten() == 1, found >= threshold)
                assert torch.equal(bank.stacks[n].trainable[expert, :rank], w * kept)


def test_snip_is_what_the_loss_loses_with_a_mask_and_grasp_what_the_gradients_norm_loses():
    torch.manual_seed(0)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    M, x = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def loss(mask=None):
        kept = w if mask is None else w * mask
        return (torch.tanh(M @ kept) * x).sum() + kept.pow(4).sum()

    mask = torch.ones(6, dtype=torch.float64, requires_grad=True)
    (by_mask,) = torch.autograd.grad(loss(mask), mask)
    (g,) = torch.autograd.grad(loss(), w, create_graph=True)
    assert_close(w * g, by_mask)  # SNIP's score is |dL/dm|
    (Hg,) = torch.autograd.grad(g @ g.detach(), w)
    before = w.detach().clone()
    assert_close(gradient_flow([w], loss)[0], (w * Hg).detach(), atol=1e-5, rtol=1e-4)
    assert torch.equal(w, before)


def test_grasp_needs_the_loss_and_leaves_random_numbers_as_they_were():
    model = sparse(settings={"scores": "grasp"}, lora_dropout=0.3)
    loss_of(model).backward()
    with pytest.raises(ConfigError, match="grasp looks at the loss of the last batch again"):
        molora.after_step(model, 1)
    state = torch.get_rng_state()
    molora.after_step(model, 1, None, lambda: loss_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    for mask, bank in zip(masks(model), banks(model), strict=True):
        assert mask["B"].sum() == bank.num_experts * round(0.25 * mask["B"][0].numel())


def test_one_masked_expert_trains_as_pefts_lora_whose_other_numbers_are_held_at_zero():
    model = sparse(**ALONE)
    molora.after_step(model, 1)
    reference = get_peft_model(
        base_model("llama", dtype=torch.float64), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    ).double()
    layers = [m for m in reference.modules() if hasattr(m, "lora_A")]
    kept = {}
    for layer, bank, mask in zip(layers, banks(model), masks(model), strict=True):
        expert = bank.expert(0)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A.data.copy_(expert.A), B.data.copy_(expert.B)
        kept |= {A: mask["A"][0], B: mask["B"][0].T}
    theirs = torch.optim.AdamW(kept, lr=0.02, weight_decay=0.1)
    for _ in range(10):
        theirs.zero_grad()
        loss_of(reference).backward()
        for parameter, mask in kept.items():
            parameter.grad.mul_(mask)
        theirs.step()
    drawn = [{n: m.clone() for n, m in mask.items()} for mask in masks(model)]
    trained(model, 10)
    for layer, bank, mask, now in zip(layers, banks(model), drawn, masks(model), strict=True):
        assert_close(bank.stacks["A"].rows[0], layer.lora_A["default"].weight, atol=1e-9, rtol=1e-7)
        assert_close(bank.stacks["B"].rows[0].T, layer.lora_B["default"].weight, atol=1e-9, rtol=1e-7)
        for n in "AB":
            assert torch.equal(mask[n], now[n]) and not bank.stacks[n].rows[mask[n] == 0].any()


def test_masks_come_back_with_the_adapter_hold_on_and_leave_with_an_export(tmp_path):
    model = sparse()
    trained(model, 2)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(
        base_model("llama", dtype=torch.float64), tmp_path / "saved", is_trainable=True,
        autocast_adapter_dtype=False,
    )  # fmt: skip
    assert torch.equal(loss_of(loaded.eval()), loss_of(model.eval()))
    trained(loaded.train(), 3)
    for before, after in zip(masks(model), masks(loaded), strict=True):
        assert all(torch.equal(before[n], after[n]) for n in "AB")
    molora.export_lora(model, tmp_path / "lora", expert="expert_1")
    lora = PeftModel.from_pretrained(base_model("llama"), tmp_path / "lora")
    zeros = [float((p == 0).float().mean()) for name, p in lora.named_parameters() if "lora_" in name]
    assert_close(zeros, [0.75] * len(zeros), atol=0.02, rtol=0)


def test_an_expert_that_has_learnt_nothing_waits_and_a_later_one_is_masked_in_its_turn():
    model = sparse()
    with torch.no_grad():
        for bank in banks(model):
            bank.stacks["B"].trainable[1] = 0
    molora.after_step(model, 1)
    for mask in masks(model):
        assert mask["A"][1].all() and not mask["A"][0].all()
    old = masks(model)
    model.add_expert("late")
    fill(model, 3)
    molora.after_step(model, 2)
    for before, mask in zip(old, masks(model), strict=True):
        assert torch.equal(mask["A"][:3], before["A"]) and not mask["A"][3].all()


def test_a_resumed_training_draws_at_the_step_it_would_have():
    once, twice = (sparse(False, {"after": 3}) for _ in range(2))
    trained(once, 5)
    optimizer = trained(twice, 2)
    states = kind_states(twice)
    banks(twice)[0].kind.restore({"step": 0})
    restore_kinds(twice, states)
    assert banks(twice)[0].kind.state() == {"step": 2}
    trained(twice, 5, 2, optimizer)
    for bank, other in zip(banks(once), banks(twice), strict=True):
        for name in bank.stacks:
            assert torch.equal(bank.stacks[name].rows, other.stacks[name].rows)


def test_what_cannot_be_is_refused():
    for settings, message in (
        ({"scores": "size"}, r"scores: is 'size'; allowed: magnitude, snip, grasp, random"),
        ({"scores": 3}, r"scores: must be a name, not 3"),
        ({"keep": 1}, r"keep: is 1; allowed: between 0 and 1"),
        ({"keep": "half"}, r"keep: must be a number, not 'half'"),
        ({"after": 0}, r"after: is 0; allowed: 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            MoLoraConfig(kind="sparse", kind_settings=settings)

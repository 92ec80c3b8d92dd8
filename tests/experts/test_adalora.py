"""AdaLoRA: one expert follows PEFT step by step; a mixture shares one budget, and no expert starves."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

import molora
from molora import GateConfig, MoLoraConfig
from molora.errors import ConfigError
from molora.experts.rank_budget import RankBudget, Triplets
from molora.tuner.after_step import kind_states, looks_at_steps, restore_kinds
from tests.experts.test_kinds import TARGETS, adalora_model, banks
from tests.zoo import base_model, batch_for, config_for

SETTINGS = {"target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "min_rank": 0}
ALONE = {"num_experts": 1, "gate": GateConfig(top_k=1), "tasks": None, "target_modules": TARGETS}


def adalora(settings=SETTINGS, **changes):
    torch.manual_seed(0)
    config = config_for("llama", kind="adalora", kind_settings=settings, **changes)
    return get_peft_model(base_model("llama", dtype=torch.float64), config).double().train()


def trained(model, after, steps, start=0, optimizer=None):
    """One batch again and again, each step followed by `after(step)` while the gradients are there."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(own, lr=0.02, weight_decay=0.1)
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        model(**batch_for("llama")).loss.backward()
        optimizer.step()
        after(step)
        yield step
    model.optimizer = optimizer


def values_left(model):
    return sum(int(bank.stacks["E"].rows.count_nonzero()) for bank in banks(model))


def test_one_expert_is_pefts_step_by_step():
    model = adalora(aux_losses={"orthonormal": 0.5}, **ALONE)
    with torch.no_grad():
        for bank in banks(model):
            bank.stacks["E"].trainable.normal_(std=0.5)
    theirs = {name: value for name, value in SETTINGS.items() if name != "min_rank"}
    reference, parts = adalora_model(
        base_model("llama", dtype=torch.float64), banks(model), total_step=14, orth_reg_weight=0.5, **theirs
    )
    ours = trained(model, lambda step: molora.after_step(model, step, 14), 14)
    others = trained(reference.base_model.train(), reference.base_model.update_and_allocate, 14)
    counts = []
    for _ in zip(ours, others, strict=True):
        for bank, part in zip(banks(model), parts, strict=True):
            for name, parameter in part.items():
                whole = bank.stacks[name].whole[0]
                assert_close(whole.view(parameter.shape), parameter, atol=1e-9, rtol=1e-7)
        counts.append(values_left(model))
    assert counts[-4:] == [8] * 4 and counts[0] == 16  # 2 of each 4, over 4 layers; then they stay so


def test_a_mixture_shares_one_budget_and_each_expert_keeps_its_best_value():
    model = adalora({**SETTINGS, "min_rank": 1, "target_r": 1}, r=[4, 2])
    total = sum(sum(bank.ranks) for bank in banks(model))
    counts = [values_left(model) for _ in trained(model, lambda step: molora.after_step(model, step, 10), 10)]
    assert counts[1] == total > counts[3] > counts[-1] == sum(bank.num_experts for bank in banks(model))
    for bank in banks(model):
        assert (bank.stacks["E"].rows.count_nonzero(dim=1) == 1).all()


def test_an_expert_without_tokens_keeps_its_importance_and_a_frozen_one_is_left_alone():
    values = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    rows = {
        "E": values,
        "A": torch.nn.Parameter(torch.ones(2, 2, 3)),
        "B": torch.nn.Parameter(torch.ones(2, 2, 4)),
    }
    budget = RankBudget(1, 0, 0, 100, 0.5, 0.5, 0, 10)
    for used in ([1.0, 1.0], [1.0, 0.0]):
        for parameter in rows.values():
            parameter.grad = torch.ones_like(parameter) * torch.tensor(used).view(
                2, *[1] * (parameter.dim() - 1)
            )
        budget.after_step({"q": Triplets(rows, [2, 2])}, None, None)
    sensitivity = budget.means["q"]["E"][0]
    assert_close(sensitivity, torch.tensor([[0.75, 1.5], [0.5, 1.0]]))
    model = adalora()
    model.freeze_experts(["expert_1"])
    before = [bank.row(1).rows["E"].clone() for bank in banks(model)]
    for _ in trained(model, lambda step: molora.after_step(model, step, 8), 6):
        pass
    assert all(
        torch.equal(bank.row(1).rows["E"], old) for bank, old in zip(banks(model), before, strict=True)
    )


def test_a_resumed_budget_goes_on_as_it_was():
    once, twice = adalora(), adalora()
    for _ in trained(once, lambda step: molora.after_step(once, step, 10), 10):
        pass
    for _ in trained(twice, lambda step: molora.after_step(twice, step, 10), 5):
        pass
    states = kind_states(twice)
    for bank in banks(twice):
        bank.kind.restore({"step": 0, "means": {}, "kept": {}})
    restore_kinds(twice, states)
    rest = trained(twice, lambda step: molora.after_step(twice, step, 10), 10, 5, twice.optimizer)
    for _ in rest:
        pass
    for bank, other in zip(banks(once), banks(twice), strict=True):
        assert torch.equal(bank.stacks["E"].rows, other.stacks["E"].rows)


def test_what_no_budget_can_be_made_of_is_refused():
    with pytest.raises(ConfigError, match=r"target_r: is 9, but ranks start at r = 8 and fall"):
        MoLoraConfig(kind="adalora", kind_settings={"target_r": 9})
    with pytest.raises(ConfigError, match=r"beta1: is 1.5; allowed: between 0 and 1"):
        MoLoraConfig(kind="adalora", kind_settings={"beta1": 1.5})
    with pytest.raises(ConfigError, match=r"orthonormal: .* Allowed kinds: adalora"):
        MoLoraConfig(aux_losses={"orthonormal": 0.5})
    with pytest.raises(ConfigError, match="nobody said how many steps"):
        model = adalora()
        molora.after_step(model)
    assert not looks_at_steps(get_peft_model(base_model("llama"), config_for("llama")))

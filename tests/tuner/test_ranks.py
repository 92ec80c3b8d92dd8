"""Ranks that grow in training: nothing that is computed, remembered or learnt so far changes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

import molora
from molora.errors import ConfigError
from molora.tuner.ranks import carry_over, ranks_of, set_ranks
from tests.experts.test_kinds import banks, fill, model_of
from tests.zoo import base_model, batch_for

GROWN = {"expert_0": 6, "expert_2": 5}


def loss_of(model):
    return model(**batch_for("llama")).loss


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def trained(model, optimizer, steps, old_rows=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        if old_rows is not None:  # the new ones learn nothing
            for bank in banks(model):
                for stack in (bank.stacks["A"], bank.stacks["B"]):
                    stack.trainable.grad[:, old_rows:] = 0
        optimizer.step()


@pytest.mark.parametrize("kind", ["lora", "lora_fa", "dora"])
def test_a_growth_changes_no_output_and_no_old_row_or_moment(kind):
    model = model_of(kind, dtype=torch.float64).train()
    model.freeze_experts(["expert_1"])
    optimizer = optimizer_of(model)
    trained(model, optimizer, 3)
    before = model(**batch_for("llama")).logits
    rows = [bank.rows() for bank in banks(model)]
    moments = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    moved = set_ranks(model, GROWN)
    carry_over(optimizer, moved)
    assert_close(model(**batch_for("llama")).logits, before, atol=1e-12, rtol=1e-12)
    assert ranks_of(model) == GROWN
    for bank, old in zip(banks(model), rows, strict=True):
        assert bank.ranks == (6, 4, 5)
        for now, then in zip(bank.rows(), old, strict=True):
            assert now.scaling == then.scaling
            for name, row in then.rows.items():
                assert torch.equal(now.rows[name][: len(row)], row)
    in_use = {p for group in optimizer.param_groups for p in group["params"]}
    assert in_use == {p for p in model.parameters() if p.requires_grad} == set(optimizer.state)
    for old, new in moved:
        if old not in moments:  # A of lora_fa
            continue
        assert optimizer.state[new]["step"] == moments[old]["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            value, then = optimizer.state[new][name], moments[old][name]
            assert value.shape == new.shape
            if value.dim() == 2:  # m of dora has no rank
                assert torch.equal(value, then)
                continue
            assert torch.equal(value[:, :4], then) and not value[:, 4:].any()
    trained(model, optimizer, 3)
    for bank, old in zip(banks(model), rows, strict=True):
        grown, was = bank.expert(0), torch.linalg.matrix_rank(old[0].rows["B"])
        assert torch.linalg.matrix_rank(grown.delta()) > was or kind == "lora_fa"


def test_old_rows_learn_on_as_in_a_training_that_never_grew():
    never, grows = (model_of("lora", dtype=torch.float64).train() for _ in range(2))
    optimizers = optimizer_of(never), optimizer_of(grows)
    for model, optimizer in zip((never, grows), optimizers, strict=True):
        trained(model, optimizer, 3)
    carry_over(optimizers[1], set_ranks(grows, dict.fromkeys(grows.expert_names, 7)))
    trained(never, optimizers[0], 5)
    for bank in banks(grows):  # weight decay acts on the new rows of A, which add nothing
        assert not bank.stacks["B"].trainable[:, 4:].any()
    trained(grows, optimizers[1], 5, old_rows=4)
    for bank, other in zip(banks(never), banks(grows), strict=True):
        for name in "AB":
            assert_close(
                other.stacks[name].trainable[:, :4], bank.stacks[name].trainable, atol=1e-10, rtol=1e-8
            )


def test_grown_ranks_and_scalings_are_saved_and_can_be_cut_off_again(tmp_path):
    model = model_of("lora")
    set_ranks(model, GROWN)
    fill(model, 6)
    expected = model(**batch_for("llama")).logits
    molora.save(model, tmp_path)
    assert "ranks of their own: expert_0 6, expert_2 5" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**batch_for("llama")).logits, expected)
    assert [bank.scalings for bank in banks(loaded)] == [(2.0, 2.0, 2.0)] * len(banks(loaded))
    set_ranks(loaded, dict.fromkeys(GROWN, 4))
    for bank, grown in zip(banks(loaded), banks(model), strict=True):
        assert bank.ranks == (4, 4, 4)
        assert torch.equal(bank.expert(0).A, grown.expert(0).A[:4])


def test_what_cannot_grow_says_why():
    for kind in ("vera", "adalora", "sparse", "core"):
        with pytest.raises(ConfigError, match=f"ranks of experts of kind {kind} cannot grow"):
            ranks_of(model_of(kind))
    with pytest.raises(ConfigError, match="experts that share one A"):
        ranks_of(model_of("lora", share_A=True))
    with pytest.raises(ConfigError, match="'expert_0' has several ranks or scalings"):
        ranks_of(model_of("lora", rank_pattern={"q_proj": 2}))

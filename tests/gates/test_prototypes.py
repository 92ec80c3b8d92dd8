"""Prototypes: Arrow against the full decomposition and PEFT's own, streaming means against the mean."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import nn
from torch.testing import assert_close

from molora.errors import RoutingError
from molora.experts.bank import Expert
from molora.gates.prototypes import MeanActivation, arrow

RANKS = (1, 4, 7, 20)  # the last one is larger than d_in and d_out
D_IN, D_OUT = 12, 9


def random_experts(dtype=torch.float32, ranks=RANKS):
    torch.manual_seed(0)
    return [
        Expert(torch.randn(rank, D_IN, dtype=dtype), torch.randn(D_OUT, rank, dtype=dtype), 2.0)
        for rank in ranks
    ]


@pytest.mark.parametrize(
    ("dtype", "returned", "atol"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
    ],
)
def test_arrow_is_the_top_right_singular_vector_up_to_sign(dtype, returned, atol):
    experts = random_experts(dtype)
    rows = arrow(experts)
    assert rows.shape == (len(RANKS), D_IN) and rows.dtype == returned
    for row, expert in zip(rows, experts, strict=True):
        expected = torch.linalg.svd(expert.B.double() @ expert.A.double()).Vh[0]
        assert_close(row.double(), expected * (row.double() @ expected).sign(), atol=atol, rtol=0)


def test_arrow_in_wide_layers_never_makes_the_product():
    # The product would have 10¹² entries.
    wide = Expert(torch.randn(2, 1_000_000), torch.randn(1_000_000, 2), 1.0)
    row = arrow([wide])[0]
    assert_close(row.norm(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_the_sign_is_fixed():
    experts = random_experts(torch.float64)
    rows = arrow(experts)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    negated = [expert._replace(A=-expert.A) for expert in experts]
    assert_close(arrow(negated), rows, atol=1e-12, rtol=0)
    level = Expert(torch.tensor([[-0.7, 0.7, 0.7]]), torch.ones(2, 1), 1.0)
    assert_close(arrow([level])[0], torch.tensor([1.0, -1.0, -1.0]) / 3**0.5)
    # Entries equal but for rounding: which of them is largest must not decide.
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for seed in range(20):
        torch.manual_seed(seed)
        R = torch.randn(3, 3, dtype=torch.float64)
        A = torch.stack([9 * signs, *torch.randn(2, 5, dtype=torch.float64) * 1e-9])
        B = torch.eye(7, 3, dtype=torch.float64)
        assert_close(arrow([Expert(R @ A, B @ R.inverse(), 1.0)])[0], signs / 5**0.5)


def test_arrow_depends_only_on_the_product():
    experts = random_experts(torch.float64)
    rows = arrow(experts)
    for change in range(3):
        torch.manual_seed(change)
        mixers = [torch.randn(e.rank, e.rank, dtype=torch.float64) + 3 * torch.eye(e.rank) for e in experts]
        changed = [
            Expert(R @ e.A, e.B @ R.inverse(), e.scaling) for R, e in zip(mixers, experts, strict=True)
        ]
        assert_close(arrow(changed), rows, atol=1e-9, rtol=0)
    both = [Expert(-e.A, -e.B, -e.scaling) for e in experts]
    assert_close(arrow(both), rows, atol=1e-12, rtol=0)


def test_padding_a_factor_with_zeros_changes_nothing():
    expert = random_experts(torch.float64, (4,))[0]
    padded = Expert(
        nn.functional.pad(expert.A, (0, 0, 0, 3)), nn.functional.pad(expert.B, (0, 3)), expert.scaling
    )
    assert_close(arrow([padded]), arrow([expert]), atol=1e-12, rtol=0)


def test_a_product_of_zero_gives_a_zero_row():
    expert = random_experts(ranks=(4,))[0]
    untrained = expert._replace(B=torch.zeros_like(expert.B))
    empty = expert._replace(A=torch.zeros_like(expert.A))
    # Neither factor is zero here, but what A writes B never reads; mixed, only rounding is left.
    half = torch.tensor([1.0, 1.0, 0.0, 0.0])
    R = torch.randn(4, 4, dtype=torch.float64)
    A, B = expert.A * half.unsqueeze(1), expert.B * (1 - half)
    apart = Expert(R @ A.double(), B.double() @ R.inverse(), 1.0)
    assert (apart.B @ apart.A).any()
    tiny = expert._replace(B=expert.B * 1e-30)
    rows = arrow([untrained, empty, apart, expert, tiny])
    assert not rows[:3].any()
    assert_close(rows[3:].norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_arrow_agrees_with_pefts_prototypes_up_to_sign():
    torch.manual_seed(0)
    experts = []
    for _ in range(3):  # a large gap between singular values: PEFT takes 15 power iterations
        rows, columns = (nn.init.orthogonal_(torch.empty(size, 3)) for size in (D_IN, D_OUT))
        experts.append(Expert(rows.t().contiguous(), columns * torch.tensor([9.0, 2.0, 1.0]), 1.0))
    names = [f"task_{i}" for i in range(3)]
    config = ArrowConfig(top_k=1, rng_seed=0)
    config.task_adapter_names = names  # as PEFT sets it itself
    layer = ArrowLoraLinearLayer(D_IN, config)
    factors = nn.ModuleDict(), nn.ModuleDict()
    for name, expert in zip(names, experts, strict=True):
        for modules, weight in zip(factors, (expert.A, expert.B), strict=True):
            modules[name] = nn.Linear(*weight.shape[::-1], bias=False)
            modules[name].weight.data.copy_(weight)
    layer.build_prototypes(*factors)
    theirs, ours = layer.prototypes, arrow(experts)
    assert_close(ours, theirs * (ours * theirs).sum(1, keepdim=True).sign(), atol=1e-5, rtol=0)


def test_the_streamed_mean_is_the_mean():
    torch.manual_seed(0)
    x = torch.randn(300, 5) + 2
    mean = MeanActivation(3, 5)
    for part in x.split((1, 99, 150, 50)):
        mean.add(part, 2)
    mean.add(x[:60].reshape(4, 15, 5), 0)
    rows = mean.rows()
    assert rows.shape == (3, 5) and rows.dtype == torch.float32
    assert_close(rows[2], x.mean(0))
    assert_close(rows[0], x[:60].mean(0))
    assert not rows[1].any()


def test_masked_tokens_do_not_enter_whatever_they_hold():
    x = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 6.0]])
    mean = MeanActivation(2, 2)
    mean.add(x, 0, mask=torch.tensor([1, 0, 1]))
    mean.add(x, 1, mask=torch.zeros(3, dtype=torch.bool))
    assert mean.rows().tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_the_sum_is_kept_in_float64():
    mean = MeanActivation(1, 1)
    for value in (1e8, 1.0, -1e8, 1.0):  # float32 would lose the ones
        mean.add(torch.full((1, 1), value, dtype=torch.float32), 0)
    assert mean.rows().item() == 0.5
    half = MeanActivation(1, 1)
    half.add(torch.full((100_000, 1), 2.0, dtype=torch.float16), 0)  # the sum is beyond float16
    assert half.rows().item() == 2.0


@pytest.mark.parametrize(
    ("shape", "expert", "mask", "message"),
    [
        ((2, 4), 3, None, "allowed: 0 to 2"),
        ((2, 4), -1, None, "allowed: 0 to 2"),
        ((2, 1), 0, None, r"\(\.\.\., 4\)"),
        ((2, 4), 0, (1,), "leading shape"),
    ],
)
def test_what_does_not_fit_is_refused(shape, expert, mask, message):
    mean = MeanActivation(3, 4)
    with pytest.raises(RoutingError, match=message):
        mean.add(torch.ones(shape), expert, None if mask is None else torch.ones(mask))
    assert not mean.rows().any()

"""The kernel against the formula written as a loop: values, gradients, dtypes, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from molora.experts.bank import Expert, ExpertBank
from molora.experts.kernel import _Expand, scores, shrink

TOKENS, D_IN, D_OUT = 5, 6, 7


def experts(ranks=(2, 3, 1), dtype=torch.float64):
    torch.manual_seed(0)
    return [
        Expert(torch.randn(r, D_IN, dtype=dtype), torch.randn(D_OUT, r, dtype=dtype), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


def naive(y, x, weights, bank_experts):
    rows = []
    for t in range(len(x)):
        row = y[t]
        for e, expert in enumerate(bank_experts):
            row = row + weights[t % len(weights), e] * expert.scaling * (expert.B @ (expert.A @ x[t]))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("frozen", [(False,) * 3, (True, False, True), (True,) * 3])
@pytest.mark.parametrize("static", [False, True])
def test_a_bank_with_ragged_ranks_equals_the_loop(frozen, static):
    bank = ExpertBank(experts(), frozen)
    x, y = torch.randn(TOKENS, D_IN, dtype=torch.float64), torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    weights = torch.rand(1 if static else TOKENS, 3, dtype=torch.float64)
    assert_close(bank(x, y.clone(), weights), naive(y, x, weights, experts()))
    chosen = (0, 2)
    kept = [experts()[i] for i in chosen]
    assert_close(
        bank(x, y.clone(), weights[:, list(chosen)], chosen), naive(y, x, weights[:, list(chosen)], kept)
    )


def test_gradients_pass_gradcheck():
    torch.manual_seed(0)
    h, weights, B = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (5, 3), (6, 7))
    )
    expansion = torch.block_diag(*[torch.full((1, 2), 1.5, dtype=torch.float64)] * 3)
    y = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)

    def add(y, h, weights, B):
        return _Expand.apply(y * 1.0, h, weights, expansion, B)

    assert torch.autograd.gradcheck(add, (y, h, weights, B))
    assert torch.autograd.gradgradcheck(add, (y, h, weights, B))
    assert torch.autograd.gradcheck(add, (y, h, weights[:1].detach().requires_grad_(True), B))
    x, *stacks = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 4), (3, 4), (2, 4), (3, 4))
    )
    for frozen in (None, 0, 1, 2):
        for i, stack in enumerate(stacks):
            stack.requires_grad_(i != frozen)
        assert torch.autograd.gradcheck(lambda x, *w: shrink(x, w[:2], w[2:]), (x, *stacks))
    assert torch.autograd.gradcheck(lambda x, *w: scores(x, w), (x, *stacks))
    assert torch.autograd.gradgradcheck(lambda x, *w: shrink(x, w[:2], w[2:]), (x, *stacks))


def test_logits_are_those_of_float32_whatever_the_dtype_and_the_neighbours():
    x, rows = torch.randn(64, 128), [torch.randn(3, 128), torch.randn(2, 128)]
    factors = [torch.randn(5, 128), torch.randn(7, 128)]
    exact = torch.cat([x.bfloat16().float() @ block.t() for block in rows], dim=1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            h, logits = shrink(x.bfloat16(), factors, rows)
            assert h.dtype == torch.bfloat16 and logits.dtype == torch.float32
            assert_close(logits, exact, atol=1e-5, rtol=1e-5)
            assert torch.equal(logits[:, :3], scores(x.bfloat16(), rows[:1]))
    with torch.autocast("cpu", torch.bfloat16):
        h, logits = shrink(x, factors, rows)
    assert h.dtype == torch.bfloat16
    assert_close(logits, torch.cat([x @ block.t() for block in rows], dim=1), atol=1e-5, rtol=1e-5)


def test_saved_tensors_of_shrink_are_x_once_in_the_layer_dtype():
    saved = []
    x = torch.randn(64, 12)
    factors = [torch.randn(5, 12, requires_grad=True), torch.randn(4, 12, requires_grad=True)]
    rows = [torch.randn(3, 12, requires_grad=True)]
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t
        ),
        torch.autocast("cpu", torch.bfloat16),
    ):
        shrink(x, factors, rows)
    parameters = [(stack.shape, torch.float32) for stack in (*factors, *rows)]
    assert saved == [(x.shape, torch.bfloat16), *parameters]


def test_padding_of_shorter_experts_never_gets_a_gradient():
    bank = ExpertBank(experts(), [False] * 3)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    bank(
        x, torch.zeros(TOKENS, D_OUT, dtype=torch.float64), torch.rand(TOKENS, 3, dtype=torch.float64)
    ).sum().backward()
    for i, rank in enumerate(bank.ranks):
        assert bank.stacks["A"].trainable.grad[i, :rank].abs().min() > 0
        assert (
            not bank.stacks["A"].trainable.grad[i, rank:].any()
            and not bank.stacks["B"].trainable.grad[i, rank:].any()
        )


def test_saved_tensors_are_h_and_the_weights_only():
    saved = []
    h, weights, B = (
        torch.randn(64, 12, requires_grad=True),
        torch.rand(64, 3),
        torch.randn(12, 32, requires_grad=True),
    )
    expansion = torch.ones(3, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        _Expand.apply(torch.zeros(64, 32), h, weights, expansion, B)
    assert sorted(tuple(s) for s in saved) == sorted([(64, 12), (64, 3), (3, 12), (12, 32)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_float32_parameters(dtype):
    bank = ExpertBank(experts(dtype=torch.float32), [False] * 3)
    x = torch.randn(TOKENS, D_IN)
    weights = torch.rand(TOKENS, 3)
    y = bank(x.to(dtype), torch.zeros(TOKENS, D_OUT, dtype=dtype), weights)
    assert y.dtype == dtype
    exact = naive(torch.zeros(TOKENS, D_OUT), x, weights, experts(dtype=torch.float32))
    assert_close(y.float(), exact, atol=0.15, rtol=0.05)
    y.float().sum().backward()
    assert bank.stacks["A"].trainable.grad.dtype == torch.float32


def test_a_base_output_that_is_a_view_or_of_another_dtype_is_left_alone():
    bank = ExpertBank(experts(dtype=torch.float32), [False] * 3)
    x, weights = torch.randn(TOKENS, D_IN), torch.rand(TOKENS, 3)
    wide = torch.zeros(TOKENS, 2 * D_OUT)
    expected = bank(x, torch.zeros(TOKENS, D_OUT), weights)
    assert_close(bank(x, wide[:, ::2], weights), expected)
    assert not wide.any()
    assert_close(bank(x, torch.zeros(TOKENS, D_OUT, dtype=torch.float64), weights), expected.double())


def test_the_state_dict_is_one_stack_in_expert_order_whatever_is_frozen():
    plain, mixed = ExpertBank(experts(), [False] * 3), ExpertBank(experts(), [False, True, False])
    assert list(plain.state_dict()) == ["A", "B"] == list(mixed.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, mixed.state_dict()[name])
    assert plain.state_dict()["B"].shape == (3, D_OUT, 3)
    fresh = ExpertBank([e._replace(A=e.A * 0, B=e.B * 0) for e in experts()], [True, False, False])
    fresh.load_state_dict(mixed.state_dict())
    assert all(
        torch.equal(a.delta(), b.delta()) for a, b in zip(fresh.experts(), mixed.experts(), strict=True)
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for A: \(2, 3, 6\) in the file, \(3, 3, 6\)"):
        fresh.load_state_dict({"A": torch.zeros(2, 3, 6), "B": mixed.state_dict()["B"]})


def test_dropout_acts_in_training_only():
    bank = ExpertBank(experts(), [False] * 3, dropout=0.5)
    x, weights = torch.randn(TOKENS, D_IN, dtype=torch.float64), torch.rand(TOKENS, 3, dtype=torch.float64)
    zeros = torch.zeros(TOKENS, D_OUT, dtype=torch.float64)
    assert not torch.equal(bank(x, zeros.clone(), weights), bank(x, zeros.clone(), weights))
    bank.eval()
    assert_close(bank(x, zeros.clone(), weights), naive(zeros, x, weights, experts()))

"""Initialisation: standard deviations, the article's equivalence, gradients at step 0, the report."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

import molora
from molora import MoLoraConfig
from molora.experts.init import INIT_KINDS, expected_std, init_A, svd_segments
from tests.zoo import base_model, batch_for, molora_model


@pytest.mark.parametrize("kind", INIT_KINDS)
@pytest.mark.parametrize("r", [4, 16, 64])
def test_std_is_as_expected_within_three_standard_errors(kind, r):
    torch.manual_seed(r)
    A = init_A(torch.empty(r, 256), kind, std=0.02, gain=1.5)
    expected = expected_std(kind, 256, r, 0.02, 1.5)
    assert abs(A.std().item() / expected - 1) < 3 / math.sqrt(2 * A.numel()) + 0.01
    if kind == "rescaled":
        assert expected == pytest.approx(1.5 * 0.02 / math.sqrt(r))
    if kind == "orthogonal":
        assert torch.allclose(A @ A.t(), 1.5**2 * torch.eye(r), atol=1e-5)


def test_the_articles_init_with_constant_scale_is_rslora_after_one_step():
    r, alpha, x, target = (
        16,
        8.0,
        torch.randn(32, 24, dtype=torch.float64),
        torch.randn(32, 12, dtype=torch.float64),
    )
    A = torch.randn(r, 24, dtype=torch.float64) * 0.02

    def delta_after_one_step(A, scaling):
        A, B = A.clone().requires_grad_(True), torch.zeros(12, r, dtype=torch.float64, requires_grad=True)
        ((x @ A.t() @ B.t() * scaling - target) ** 2).mean().backward()
        return scaling * (B - 0.1 * B.grad).detach() @ (A - 0.1 * A.grad).detach()

    article, published = (
        delta_after_one_step(A / math.sqrt(r), alpha),
        delta_after_one_step(A, alpha / math.sqrt(r)),
    )
    assert torch.allclose(article, published, atol=1e-15)


def test_the_double_shrink_is_warned_about_and_its_cures_are_not():
    with pytest.warns(UserWarning, match="shrink twice"):
        MoLoraConfig(init="rescaled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoLoraConfig(init="rescaled", scaling="alpha")
        MoLoraConfig(use_rslora=True)


def test_at_step_0_only_B_gets_a_gradient():
    model = molora_model("llama", "soft-group", trained=False).train()
    model(**batch_for("llama")).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0
        elif "lora_A" in name:
            assert not parameter.grad.any()


def test_the_report_knows_untouched_from_changed_experts():
    model = molora_model("llama", "soft-group", trained=False, init="gaussian")
    rows = molora.init_std_report(model)
    assert len(rows) == 14 * 3 and all(row["ok"] for row in rows)
    assert set(rows[0]) == {"name", "expert", "r", "std", "expected", "ratio", "ok"}
    next(p for n, p in model.named_parameters() if "lora_A" in n).data.mul_(3)
    assert sum(not row["ok"] for row in molora.init_std_report(model)) == 3


@pytest.mark.parametrize(("experts", "rank"), [(8, 2), (3, 5), (7, 4)])
def test_segments_begin_at_multiples_of_the_whole_number_of_vectors_per_expert(experts, rank):
    """GOAT: of 19 singular vectors, those of expert i begin at `i · (19 // experts)`."""
    weight = torch.randn(23, 19, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    factors = svd_segments(weight.float(), [rank] * experts, [16.0] * experts)
    for i, (A, B) in enumerate(factors):
        start = min(i * (19 // experts), 19 - rank)
        part = slice(start, start + rank)
        segment = U[:, part] * S[part] @ Vh[part] / 10
        assert_close(16 * B.double() @ A.double(), segment, atol=1e-5, rtol=1e-4)


def test_mhr_starts_each_part_as_a_layer_of_its_width():
    """PEFT draws A for every part: kaiming of d_in / 4 inputs, uniform within ±1/√(d_in / 4)."""
    torch.manual_seed(0)
    model = get_peft_model(
        base_model("llama"), molora.preset("mhr", tasks={"a": [f"expert_{i}" for i in range(4)]})
    )
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "mounts") and m.mounts]:
        A = torch.stack([expert.A for expert in layer.molora_experts["default"].experts()])
        bound = (A.shape[-1] / 4) ** -0.5
        assert 0.95 * bound < A.abs().max() <= bound, name

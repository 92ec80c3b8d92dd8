"""Allocation of experts to blocks: exponents of known spectra, and integers with the promised properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.errors import ConfigError
from molora.experts.spectra import allocate, hill_exponent

EXPONENTS = st.lists(st.floats(0.1, 20), min_size=1, max_size=40)


def weight_with(eigenvalues, d_out, d_in):
    """A random weight (d_out, d_in) whose WᵀW has these eigenvalues, and zeros."""
    torch.manual_seed(0)
    n = len(eigenvalues)
    left, right = (torch.linalg.qr(torch.randn(d, n, dtype=torch.float64)).Q for d in (d_out, d_in))
    return left * eigenvalues.sqrt() @ right.t()


def power_law(alpha, n):
    """Quantiles of the density λ ** -alpha on λ >= 1, largest first."""
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_the_exponent_of_a_power_law_is_recovered(alpha, fraction):
    weight = weight_with(power_law(alpha, 400), 450, 400)
    found = hill_exponent(weight, fraction)
    assert found == pytest.approx(alpha, rel=0.02)
    assert hill_exponent(weight.t() * 37.0, fraction) == pytest.approx(found, rel=1e-9)
    assert hill_exponent(weight.float(), fraction) == pytest.approx(found, rel=1e-3)


def test_the_exponent_is_hills_formula():
    eigenvalues = torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    weight = weight_with(eigenvalues, 6, 7)
    log = math.log(2)
    assert hill_exponent(weight) == pytest.approx(1 + 2 / (2 * log + log))
    assert hill_exponent(weight, 0.8) == pytest.approx(1 + 4 / (10 * log))
    assert hill_exponent(weight, 1.0) == pytest.approx(1 + 4 / (10 * log))  # the fifth is what they exceed
    assert hill_exponent(weight, 0.01) == pytest.approx(1 + 1 / log)


def test_zero_eigenvalues_do_not_count():
    eigenvalues = power_law(3.0, 40)
    full, deficient = weight_with(eigenvalues, 40, 40), weight_with(eigenvalues, 300, 300)
    assert hill_exponent(deficient) == pytest.approx(hill_exponent(full), rel=1e-9)
    assert hill_exponent(deficient.float()) == pytest.approx(hill_exponent(full), rel=1e-3)


def test_a_lighter_tail_has_a_larger_exponent():
    torch.manual_seed(0)
    light = torch.randn(200, 200)
    heavy = weight_with(power_law(1.5, 200), 200, 200)
    assert hill_exponent(light) > hill_exponent(heavy) + 0.5
    assert hill_exponent(light.bfloat16()) == pytest.approx(hill_exponent(light), rel=0.01)


def test_equal_eigenvalues_have_no_tail():
    assert hill_exponent(torch.eye(6)) == math.inf


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, math.nan])
def test_fractions_that_mean_nothing_are_refused(fraction):
    with pytest.raises(ConfigError, match="above 0, up to 1"):
        hill_exponent(torch.randn(4, 4), fraction)


@pytest.mark.parametrize("weight", [torch.zeros(5, 5), torch.ones(5, 4)])
def test_a_weight_without_two_eigenvalues_is_refused(weight):
    with pytest.raises(ConfigError, match="rank 2 or more"):
        hill_exponent(weight)


def test_known_allocations():
    assert allocate([1.0, 2.0, 3.0], 12, beta=1) == [2, 4, 6]
    assert allocate([1.0, 2.0], 10, beta=2) == [2, 8]
    assert allocate([1.0, 1.0, 1.0], 5) == [2, 2, 1]  # ties go to the first blocks
    assert allocate([8.0, 5.0, 5.0], 12, beta=1) == [
        6,
        3,
        3,
    ]  # 16/3, 10/3, 10/3: a tie that floats would miss
    assert allocate([5.0, 5.0, 2.0], 4, beta=1) == [2, 1, 1]  # quotas 5/3, 5/3 and 2/3, the last one raised
    assert allocate([3.5, 2.5, 1.0], 7, beta=1, least=0) == [4, 2, 1]  # 3.5, 2.5 and 1: the first half wins
    assert allocate([4.0, 4.0, 0.01], 11, beta=2.5, least=3) == [4, 4, 3]
    assert allocate([9.0, 1e-9], 6, least=0) == [6, 0]
    assert allocate([2.0, 9.0], 10, beta=0) == [5, 5]
    assert allocate([3.0, 7.0], 4, least=2) == [2, 2]
    assert allocate([2e300, 1e300], 5, beta=2) == allocate([2e-300, 1e-300], 5, beta=2) == [4, 1]


def test_the_default_power_is_the_papers():
    exponents = [2.0, 3.1, 4.7, 3.9]
    assert allocate(exponents, 160) == allocate(exponents, 160, beta=2.5) != allocate(exponents, 160, beta=1)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(EXPONENTS, st.integers(0, 200), st.floats(0, 8), st.integers(0, 4))
def test_integers_sum_to_the_total_within_bounds(exponents, extra, beta, least):
    total = least * len(exponents) + extra
    counts = allocate(exponents, total, beta, least)
    assert sum(counts) == total and all(type(count) is int and count >= least for count in counts)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=20), st.integers(0, 100), st.integers(0, 3))
def test_a_larger_exponent_never_gets_fewer(exponents, extra, least):
    counts = allocate([e / 10 for e in exponents], least * len(exponents) + extra, least=least)
    for (one, n), (other, m) in itertools.permutations(zip(exponents, counts, strict=True), 2):
        assert one <= other or n >= m


@settings(deadline=None, derandomize=True, max_examples=200)
@given(EXPONENTS, st.integers(1, 300), st.floats(0.5, 4))
def test_without_a_bound_a_count_is_its_share_rounded_up_or_down(exponents, total, beta):
    powers = [exponent**beta for exponent in exponents]
    counts = allocate(exponents, total, beta, least=0)
    for power, count in zip(powers, counts, strict=True):
        assert abs(count - total * power / sum(powers)) < 1 + 1e-6


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_the_order_of_the_blocks_does_not_matter(data):
    exponents = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=20, unique=True))
    order = data.draw(st.permutations(range(len(exponents))))
    values = [0.01 * exponent + 1 for exponent in exponents]
    total = len(values) + data.draw(st.integers(0, 100))
    counts = allocate(values, total)
    assert allocate([values[i] for i in order], total) == [counts[i] for i in order]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([2.0, 3.0, 4.0], 2), "a total of 3 or more"),
        (([2.0, 3.0], 7, 2.5, 4), "a total of 8 or more"),
        (([], 4), "one exponent or more"),
        (([2.0, math.inf], 4), "finite numbers above 0"),
        (([2.0, math.nan], 4), "finite numbers above 0"),
        (([2.0, 0.0], 4), "finite numbers above 0"),
        (([2.0, 3.0], 4, -1.0), "finite numbers from 0"),
        (([2.0, 3.0], 4, 2.5, -1), "0 or more"),
    ],
)
def test_what_allows_no_allocation_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        allocate(*arguments)

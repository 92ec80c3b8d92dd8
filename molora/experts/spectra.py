"""How many experts each block gets, from how well trained its pretrained weights look.

AlphaLoRA (arXiv:2410.10054): the spectrum of a well-trained weight has a heavy tail, so a large power-law
exponent asks for more experts, in proportion to its power `beta` (theirs: 2.5). Not the authors' numbers:
their script `expert_number.py` places the tail's start by the smallest Kolmogorov-Smirnov distance, takes
the mean exponent of a block's linear layers, knows no least number, and repairs rounded numbers one by one.
Reconstructed here: the tail as a fixed fraction of the eigenvalues, leaving out those that are zero; the
least number of experts; largest remainders. Joining a block's exponents is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from molora.errors import ConfigError


@torch.no_grad()
def hill_exponent(weight: Tensor, fraction: float = 0.5) -> float:
    """Power-law exponent of the tail of the eigenvalues λ of `WᵀW`, for `weight` (d_out, d_in).

    Hill's estimator over the largest `k = fraction · n` of the n eigenvalues that are not zero,
    `1 + k / Σ_{i<=k} log(λ_i / λ_{k+1})`, with 1 <= k < n. Infinite where these are all equal.

    Raises:
        ConfigError: a fraction outside (0, 1], or fewer than two eigenvalues that are not zero.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}; allowed: above 0, up to 1.")
    singular = torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    noise = singular.max() * torch.finfo(singular.dtype).eps * max(weight.shape)
    logs = 2 * singular[singular > noise].double().cpu().log()  # in descending order, as svdvals gives them
    if len(logs) < 2:
        raise ConfigError(f"a weight of rank {len(logs)} has no tail to fit; allowed: rank 2 or more.")
    k = min(max(int(fraction * len(logs)), 1), len(logs) - 1)
    excess = (logs[:k] - logs[k]).sum().item()
    return 1 + k / excess if excess > 0 else math.inf


def allocate(exponents: Sequence[float], total: int, beta: float = 2.5, least: int = 1) -> list[int]:
    """Experts of each block: integers proportional to `exponent ** beta` that sum to `total`.

    Blocks whose share is below `least` get `least`; the others share what remains. Fractions go to the
    largest remainders, ties to the first block.

    Raises:
        ConfigError: fewer than `least` experts a block, or values that allow no proportions.
    """
    _check(exponents, total, beta, least)
    # A power of two keeps the powers finite without rounding; exact fractions make neither ties nor the
    # sum depend on the order of the blocks.
    scale = -math.frexp(max(exponents))[1]
    weights = [Fraction(math.ldexp(exponent, scale) ** beta) for exponent in exponents]
    free, left = list(range(len(weights))), total
    shares: dict[int, Fraction] = {}
    while free:
        sum_free = sum(weights[i] for i in free)
        shares = {i: left * weights[i] / sum_free for i in free}
        kept = [i for i in free if shares[i] >= least]
        if len(kept) == len(free):
            break
        left -= least * (len(free) - len(kept))
        free = kept
    counts = [math.floor(shares[i]) if i in free else least for i in range(len(weights))]
    by_remainder = sorted(free, key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check(exponents: Sequence[float], total: int, beta: float, least: int) -> None:
    if not exponents:
        raise ConfigError("there are no blocks to allocate experts to; allowed: one exponent or more.")
    bad = [exponent for exponent in exponents if not (math.isfinite(exponent) and exponent > 0)]
    if bad:
        raise ConfigError(f"exponents are {bad}; allowed: finite numbers above 0.")
    if not (math.isfinite(beta) and beta >= 0):
        raise ConfigError(f"beta is {beta}; allowed: finite numbers from 0.")
    if least < 0:
        raise ConfigError(f"least is {least}; allowed: 0 or more.")
    if total < least * len(exponents):
        raise ConfigError(
            f"{total} experts cannot give {len(exponents)} blocks {least} each; allowed: a total of "
            f"{least * len(exponents)} or more.",
            hint="raise the total or lower the least number a block gets.",
        )

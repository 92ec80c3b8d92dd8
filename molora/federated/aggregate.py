"""How the tensors of several clients become those of one adapter: pure functions, in float64.

A state maps an adapter file's keys to its tensors: A (expert, rank, d_in), B (expert, d_out, rank), gate rows, heads. All
states are in the scaling of the start (`update.py` sees to it), so that the product B A is an expert's update. What all
clients sent alike is kept as it is, bit for bit: frozen experts, and tensors that never learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molora.config.federated import AGGREGATORS
from molora.experts.products import Product, stacked, truncated

State = Mapping[str, Tensor]
A, B = "molora_experts.A", "molora_experts.B"
_NOTHING = 1e-10  # a singular value below this share of the largest is rounding


class Aggregated(NamedTuple):
    """One state, and the share of the update's norm that it lacks."""

    tensors: dict[str, Tensor]
    lost: float = 0.0


Function = Callable[[State, Sequence[State], Sequence[float]], Aggregated]


def aggregate(name: str, start: State, states: Sequence[State], weights: Sequence[float]) -> Aggregated:
    """What clients sent as one state, by a registered way; the tensors' dtypes are those of `start`.

    Args:
        start: the state that the clients started from.
        weights: one each, above 0; they are divided by their sum.
    """
    total = math.fsum(weights)
    function: Function = AGGREGATORS[name].load()
    return function(start, states, [weight / total for weight in weights])


def fedavg(start: State, states: Sequence[State], shares: Sequence[float]) -> Aggregated:
    """The mean of every tensor: FedIT, arXiv:2305.05644.

    The mean of A times the mean of B is not the mean of the products: where clients differ much, `ffa` and `flora` are
    nearer to what they learned.
    """
    return Aggregated({key: mean([state[key] for state in states], shares, start[key]) for key in start})


def ffa(start: State, states: Sequence[State], shares: Sequence[float]) -> Aggregated:
    """The mean of B under one A that nobody trains, exact on products: FFA-LoRA, arXiv:2403.12313."""
    kept = {key: start[key] for key in start if key.endswith(A)}
    rest = {key: value for key, value in start.items() if key not in kept}
    return Aggregated({**kept, **fedavg(rest, states, shares).tensors})


def flora(start: State, states: Sequence[State], shares: Sequence[float]) -> Aggregated:
    """The mean of the products by stacking the factors, ranks may differ: FLoRA, arXiv:2409.05976.

    The paper merges the stack, whose rank is the sum of the clients', into the base, and starts the next round with a
    new LoRA. Here the base never changes: each expert's stack is folded back to the rank it has in `start` by its
    singular values, which is exact where the mean has that rank, and else the nearest (Eckart and Young); `lost` says how
    near. Dimensions that are left over get the start's rows of A and a B of zero, from which they can learn.
    """
    made: dict[str, Tensor] = {}
    lost = whole = 0.0
    for key in (key for key in start if key.endswith(A)):
        other = key.removesuffix(A) + B
        pairs = [(state[key], state[other]) for state in states]
        if all(_equal(pairs[0], pair) for pair in pairs):
            made[key], made[other] = pairs[0]
            if made[key].shape == start[key].shape:
                continue
        made[key], made[other] = start[key].clone(), torch.zeros_like(start[other])
        for expert in range(len(start[key])):
            cut = _fold(
                stack(pairs, shares, expert), made[key][expert], start[other][expert], made[other][expert]
            )
            lost, whole = lost + cut[0], whole + cut[1]
    rest = {key: value for key, value in start.items() if key not in made}
    share = math.sqrt(max(0.0, lost) / whole) if whole else 0.0
    return Aggregated({**made, **fedavg(rest, states, shares).tensors}, share)


def stack(pairs: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], expert: int) -> Product:
    """`sum_k p_k B_k A_k` of one expert exactly, its rank the sum of the clients'; `pairs` are A and B of each."""
    return stacked([Product(B[expert].double(), A[expert].double()) for A, B in pairs], shares)


def mean(values: Sequence[Tensor], shares: Sequence[float], like: Tensor) -> Tensor:
    """The weighted mean; where all are equal, that."""
    if all(torch.equal(values[0], value) for value in values):
        return values[0].to(like.dtype)
    total = torch.zeros_like(like, dtype=torch.float64)
    for value, share in zip(values, shares, strict=True):
        total += share * value.double()
    return total.to(like.dtype)


def _fold(whole: Product, A: Tensor, start_B: Tensor, B: Tensor) -> tuple[float, float]:
    """Write the nearest product of one expert's own rank into its A (rank, d_in), which holds the start's, and B of zeros.

    Returns the squared norm of what was cut off, and of the whole.
    """
    own = int((A.any(dim=1) | start_B.any(dim=0)).sum())  # the rest of the stack's rows is padding
    cut = truncated(whole, min(own, whole.rank))
    values = cut.product.A.square().sum(dim=1)  # singular values: the factors are balanced
    kept = int((values > _NOTHING * values.max()).sum()) if values.any() else 0
    A[:kept], B[:, :kept] = cut.product.A[:kept].to(A.dtype), cut.product.B[:, :kept].to(B.dtype)
    return cut.lost, cut.whole


def _equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

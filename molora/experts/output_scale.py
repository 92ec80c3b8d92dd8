"""Output scales: experts of some kinds multiply each number of the layer's output, the base's and their own (DoRA).

    y = base(x) + Σ_e g_e ((c_e - 1) ∘ W x + c_e ∘ s_e B_e A_e x)

c_e ∘ B_e is an ordinary B, so the kernel stays what it is; what remains is `deviation`, Σ_e g_e (c_e - 1), times the
base's output without its bias. Experts whose c is 1 change no bit of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molora.experts.kernel import as_written
from molora.experts.kinds.kind import Kind


class Built(NamedTuple):
    """Factors of some experts that carry their output scales, and how far these are from 1."""

    A: Tensor  # as of `Kind.factors`
    B: Tensor
    deviation: Tensor | None  # (expert, d_out); None: a kind that leaves the base's output alone


def built(kind: Kind, rows: Mapping[str, Tensor], scalings: Sequence[float]) -> Built:
    """The factors of the experts whose rows and scalings these are."""
    A, B = kind.factors(rows)
    if not kind.scales_output:
        return Built(A, B, None)
    scale = kind.output_scale(rows, scalings)
    return Built(A, B * scale.unsqueeze(1).to(B.dtype), scale - 1)


def factors_of(
    kind: Kind,
    parts: Sequence[Mapping[str, Tensor]],
    order: Sequence[int],
    scalings: Sequence[float],
    *,
    whole: bool,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """The factors of each part of a bank, and the deviations of all experts in them, (expert, d_out).

    Args:
        parts: rows of every stack.
        order: the experts in all parts, one after the other.
        scalings: of every expert of the bank.
        whole: the parts are the whole bank; its deviations are then put in expert order.
    """
    if not kind.scales_output:
        return [kind.factors(part) for part in parts], None
    found, rest = [], list(order)
    for part in parts:
        own = [rest.pop(0) for _ in range(max(len(rows) for rows in part.values()))]
        found.append(built(kind, part, [scalings[i] for i in own]))
    deviation = torch.cat([part.deviation for part in found if part.deviation is not None])
    if whole and len(parts) > 1:
        deviation = deviation[[order.index(i) for i in range(len(order))]]
    return [(part.A, part.B) for part in found], deviation


def rescaled(y: Tensor, deviation: Tensor, bias: Tensor | None) -> Tensor:
    """`y + deviation ∘ (y - bias)`, a new tensor.

    Args:
        y: (batch, ..., d_out) the base layer's output.
        deviation: (row, d_out), of rows that share y's tokens evenly and in order: tokens, samples, or one for all.
        bias: (d_out,) the base layer's.
    """
    with as_written(y):
        by_row = y.reshape(deviation.shape[0], -1, y.shape[-1])
        linear = by_row if bias is None else by_row - bias.to(y.dtype)
        return torch.addcmul(by_row, deviation.to(y.dtype).unsqueeze(1), linear).reshape(y.shape)


def mixed(weights: Tensor, deviation: Tensor) -> Tensor:
    """Deviation of each row, (row, d_out), from weights (row, expert) and those of the experts (expert, d_out)."""
    with as_written(weights):
        dtype = torch.promote_types(weights.dtype, deviation.dtype)
        return weights.to(dtype) @ deviation.to(dtype)

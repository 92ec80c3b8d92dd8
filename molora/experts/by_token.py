"""By token: tokens grouped by expert, so that each expert multiplies its own tokens only.

    index (tokens, slot)  3 1      sorted by expert   0: token 1   1: tokens 0, 2   3: token 0 ...   one product each
                          0 1

The copies of x in the experts' order live only while they are multiplied, forward and backward anew: what is kept are
x and h (tokens * slots, rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.experts.kernel import as_written, linear_dtype, may_overwrite

_GROUPED = getattr(F, "grouped_mm", None)  # of torch 2.10 and later


class Groups(NamedTuple):
    """The pairs of a token and one of its experts, in the experts' order."""

    token: Tensor  # (pair,) int64
    pair: Tensor  # (pair,) int64: its place in (tokens * slots,)
    ends: Tensor  # (expert,) int32: one past each expert's last pair

    @classmethod
    def of(cls, index: Tensor, num_experts: int) -> Groups:
        """From the experts (tokens, slot) of each token."""
        experts, pair = index.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=index.device), right=True)
        return cls(pair // index.shape[1], pair, ends.to(torch.int32))

    def of_one_copy(self, copies: int) -> Groups:
        """The same pairs where the tokens are copies, one batch after the other, of what is read once."""
        tokens = len(self.pair) // copies
        pair = self.pair % tokens * copies + self.pair // tokens
        return Groups(pair // copies, pair, self.ends)


def shrink(x: Tensor, factors: Sequence[Tensor], groups: Groups) -> Tensor:
    """`A x` of each pair.

    Args:
        x: (..., d_in).
        factors: A (expert, rank, d_in) of each layer that reads x, in expert order.
        groups: of the tokens of x.

    Returns:
        (pair, rank): columns by layer; in the dtype in which a linear layer would compute x.
    """
    flat = x.reshape(-1, x.shape[-1])
    return _Shrink.apply(flat, linear_dtype(x), groups, *factors)


def expand(y: Tensor, h: Tensor, scale: Tensor, B: Tensor, groups: Groups) -> Tensor:
    """Add the experts' outputs to y, at each pair's token.

    Args:
        y: (..., d_out) the base layer's output; overwritten where that is safe.
        h: (pair, rank).
        scale: (pair, rank) or (pair, 1) what h is multiplied by: weight times scaling.
        B: (expert, rank, d_out), in expert order.
        groups: as for `shrink`.
    """
    if may_overwrite(y, h):
        return _Expand.apply(y, h, scale, B, groups)
    with as_written(y):
        nothing = torch.zeros_like(y, dtype=h.dtype, memory_format=torch.contiguous_format)
        return y + _Expand.apply(nothing, h, scale, B, groups).to(y.dtype)


def grouped(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows (pair, k) times its own factor (expert, k, n): (pair, n)."""
    if _by_torch(rows, factors):
        return _GROUPED(rows, factors, offs=ends)  # type: ignore[misc]
    out = rows.new_empty(len(rows), factors.shape[2])
    for expert, start, end in _filled(ends):
        torch.mm(rows[start:end], factors[expert], out=out[start:end])
    return out


def grouped_gradient(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`leftᵀ right` of each group: (pair, k) and (pair, n) -> (expert, k, n)."""
    if _by_torch(left.t(), right):
        return _GROUPED(left.t(), right, offs=ends)  # type: ignore[misc]
    out = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for expert, start, end in _filled(ends):
        torch.mm(left[start:end].t(), right[start:end], out=out[expert])
    return out


def _by_torch(*factors: Tensor) -> bool:
    """Whether torch's grouped product takes them: not float64, and no rows that begin off 16 bytes."""
    return (
        _GROUPED is not None
        and all(factor.dtype in (torch.float32, torch.bfloat16) for factor in factors)
        and all(max(factor.stride()[-2:]) * factor.element_size() % 16 == 0 for factor in factors)
    )


def _filled(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the groups that have rows."""
    stops = ends.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *stops], stops, strict=False)) if a < b]


def _summed(target: Tensor, rows: Tensor, groups: Groups) -> Tensor:
    """Add each pair's row (pair, d) to its token of target (tokens, d), in place, in a fixed order."""
    if not rows.is_cuda:
        return target.index_add_(0, groups.token, rows)
    places = torch.empty_like(groups.pair)
    places[groups.pair] = torch.arange(len(places), device=places.device)
    return target.add_(rows[places].reshape(len(target), -1, rows.shape[1]).sum(dim=1))


class _Shrink(torch.autograd.Function):
    """`shrink` keeping x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, groups: Groups, *factors: Tensor) -> Tensor:
        ctx.x_dtype = x.dtype
        with as_written(x):
            low = x.to(dtype)
            ctx.save_for_backward(low, *groups, *factors)
            sent = low.index_select(0, groups.token)
            parts = [grouped(sent, A.to(dtype).mT, groups.ends) for A in factors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        x, token, pair, ends, *factors = ctx.saved_tensors
        groups, (need_x, _, _, *needed) = Groups(token, pair, ends), ctx.needs_input_grad
        gradients: list[Tensor | None] = []
        with as_written(x):
            columns = [c.contiguous() for c in dh.to(x.dtype).split([A.shape[1] for A in factors], dim=1)]
            sent = x.index_select(0, token)
            for A, part, need in zip(factors, columns, needed, strict=True):
                gradients.append(grouped_gradient(part, sent, ends).to(A.dtype) if need else None)
            del sent
            dx = torch.zeros_like(x) if need_x else None
            if dx is not None:
                for A, part in zip(factors, columns, strict=True):
                    _summed(dx, grouped(part, A.to(x.dtype), ends), groups)
                dx = dx.to(ctx.x_dtype)
        return dx, None, None, *gradients


class _Expand(torch.autograd.Function):
    """`expand` in place, keeping h and the weights."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, scale: Tensor, B: Tensor, groups: Groups) -> Tensor:
        with as_written(y):
            out = grouped((h * scale.to(h.dtype)).contiguous(), B.to(h.dtype), groups.ends)
            _summed(y.view(-1, y.shape[-1]), out, groups)
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, scale, B, *groups)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, scale, B, token, _, ends = ctx.saved_tensors
        need_y, need_h, need_scale, need_B, _ = ctx.needs_input_grad
        dh = dscale = dB = None
        with as_written(dy):
            sent = dy.reshape(-1, dy.shape[-1]).to(h.dtype).index_select(0, token)
            factor = scale.to(h.dtype)
            if need_B:
                dB = grouped_gradient((h * factor).contiguous(), sent, ends).to(B.dtype)
            if need_h or need_scale:
                du = grouped(sent, B.to(h.dtype).mT, ends)
                if need_scale:
                    dscale = (du * h).to(scale.dtype)
                    dscale = dscale if scale.shape[1] > 1 else dscale.sum(dim=1, keepdim=True)
                dh = du * factor if need_h else None
        return (dy if need_y else None), dh, dscale, dB, None

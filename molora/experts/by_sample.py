"""By sample: each sample multiplies the factors of its own few experts, all samples in one batched product.

    x (sample, seq, d_in) ── A of the sample's experts ──> h ── ∘ weights ── B of the same ──> added to y

The cost is that of one LoRA of rank slots * rank, however many experts there are, and no other expert can change the
result. The factors are gathered anew for the backward pass: what is kept are x and h, as a plain LoRA keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molora.experts.kernel import as_written, linear_dtype, may_overwrite
from molora.experts.picks import Picked


def shrink(x: Tensor, factors: Sequence[Picked]) -> Tensor:
    """`A x` of each sample's experts.

    Args:
        x: (sample, seq, d_in).
        factors: A of each layer that reads x; blocks (expert, rank, d_in).

    Returns:
        (sample, seq, rank): columns by layer, then slot; in the dtype in which a linear layer would compute x.
    """
    dtype = linear_dtype(x)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        with as_written(x):
            return torch.bmm(x.to(dtype), joined(factors, dtype).mT)
    tensors = [tensor for factor in factors for tensor in (factor.places, *factor.blocks)]
    return _Shrink.apply(x, dtype, [len(factor.blocks) for factor in factors], *tensors)


def expand(y: Tensor, h: Tensor, scale: Tensor, B: Picked, rows: Tensor | None = None) -> Tensor:
    """Add each sample's experts' outputs to y: `y + (h ∘ scale) B`.

    Args:
        y: (batch, ..., d_out) the base layer's output; overwritten where that is safe.
        h: (sample, seq, rank), with `batch * ... = sample * seq` tokens in the same order, where `rows` is None.
        scale: (sample, rank) what h's columns are multiplied by: weight times scaling.
        B: blocks (expert, rank, d_out).
        rows: (sample,) which samples of y those of h are; None: all.
    """
    if may_overwrite(y, h) and torch.is_grad_enabled():
        return _Expand.apply(y, h, scale, rows, B.places, *B.blocks)
    with as_written(y):
        scaled, factors = h * scale.to(h.dtype).unsqueeze(1), B.gathered(h.dtype)
        return add(y, scaled, factors, rows)


def joined(factors: Sequence[Picked], dtype: torch.dtype) -> Tensor:
    """The factors of several layers, (sample, rank, d)."""
    parts = [factor.gathered(dtype) for factor in factors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add(y: Tensor, scaled: Tensor, B: Tensor, rows: Tensor | None) -> Tensor:
    """`y + scaled B` of the samples in `rows`: scaled (sample, seq, rank), B (sample, rank, d_out), both of one dtype."""
    if may_overwrite(y, scaled):
        _add(y, scaled, B, rows)
        return y
    out = torch.bmm(scaled, B).to(y.dtype)
    if rows is None:
        return y + out.reshape(y.shape)
    return y.reshape(-1, *out.shape[1:]).index_add(0, rows, out).reshape(y.shape)


def _add(y: Tensor, scaled: Tensor, B: Tensor, rows: Tensor | None) -> None:
    by_sample = y.view(-1, scaled.shape[1], y.shape[-1])
    if rows is None:
        by_sample.baddbmm_(scaled, B)
    else:  # rows differ from each other, so the order in which they are added does not matter
        by_sample.index_add_(0, rows, torch.bmm(scaled, B))


class _Shrink(torch.autograd.Function):
    """`shrink` keeping x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, counts: list[int], *tensors: Tensor) -> Tensor:
        ctx.counts, ctx.x_dtype = counts, x.dtype
        with as_written(x):
            low = x.to(dtype)
            ctx.save_for_backward(low, *tensors)
            return torch.bmm(low, joined(_factors(counts, tensors), dtype).mT)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        need_x, _, _, *needed = ctx.needs_input_grad
        factors, dx = _factors(ctx.counts, tensors), None
        with as_written(x):
            dh = dh.to(x.dtype)
            if need_x:
                dx = torch.bmm(dh, joined(factors, x.dtype)).to(ctx.x_dtype)
            gradients: list[Tensor | None] = []
            start = column = 0
            for factor in factors:
                wanted = needed[start + 1 : start + 1 + len(factor.blocks)]
                width = factor.places.shape[1] * factor.blocks[0].shape[1]
                gradients += [None, *[None] * len(wanted)]
                if any(wanted):
                    dA = torch.bmm(dh[..., column : column + width].mT, x)
                    gradients[-len(wanted) :] = factor.scattered(dA, wanted)
                start, column = start + 1 + len(wanted), column + width
        return dx, None, None, *gradients


class _Expand(torch.autograd.Function):
    """`expand` keeping h and the weights."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, scale: Tensor, rows: Tensor | None, places: Tensor, *blocks: Tensor
    ) -> Tensor:
        with as_written(y):
            B = Picked(blocks, places).gathered(h.dtype)
            _add(y, h * scale.to(h.dtype).unsqueeze(1), B, rows)
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, scale, rows, places, *blocks)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, scale, rows, places, *blocks = ctx.saved_tensors
        need_y, need_h, need_scale, _, _, *needed = ctx.needs_input_grad
        B, dh, dscale = Picked(blocks, places), None, None
        gradients: list[Tensor | None] = [None] * len(blocks)
        with as_written(dy):
            upstream = dy.reshape(-1, h.shape[1], dy.shape[-1])
            upstream = (upstream if rows is None else upstream.index_select(0, rows)).to(h.dtype)
            factor = scale.to(h.dtype).unsqueeze(1)
            if any(needed):
                gradients = B.scattered(torch.bmm((h * factor).mT, upstream), needed)
            if need_h or need_scale:
                du = torch.bmm(upstream, B.gathered(h.dtype).mT)
                dscale = (du * h).to(scale.dtype).sum(dim=1) if need_scale else None
                dh = du * factor if need_h else None
        return (dy if need_y else None), dh, dscale, None, None, *gradients


def _factors(counts: Sequence[int], tensors: Sequence[Tensor]) -> list[Picked]:
    """What `_Shrink.apply` was given flat."""
    found, start = [], 0
    for count in counts:
        found.append(Picked(tensors[start + 1 : start + 1 + count], tensors[start]))
        start += 1 + count
    return found

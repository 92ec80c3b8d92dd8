"""The one hot path: y += (x Aᵀ ∘ g P) B for all experts at once, in place, keeping only h and g."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def expand(y: Tensor, h: Tensor, weights: Tensor, expansion: Tensor, B: Tensor) -> Tensor:
    """Add the experts' outputs to y: `y + (h ∘ (weights · expansion)) B`.

    Args:
        y: (..., d_out) the base layer's output; overwritten where that is safe.
        h: (tokens, rank) all experts' `A x`, side by side.
        weights: (tokens, expert) or (1, expert) gate weights.
        expansion: (expert, rank) each expert's scaling on its own columns, so that differing ranks
            and scalings cost nothing.
        B: (rank, d_out) all experts' `B`, stacked.
    """
    if y.dtype != h.dtype or not y.is_contiguous() or torch.compiler.is_compiling():
        # A base layer may return a view or its own dtype (quantised ones do); then stay out of place. So too
        # in a compiled graph, where every linear with a bias is a view, and memory is the compiler's affair.
        with torch.autocast(y.device.type, enabled=False):
            delta = (h * (weights @ expansion.to(weights.dtype)).to(h.dtype)) @ B.to(h.dtype)
        return y + delta.to(y.dtype).reshape(y.shape)
    if not torch.is_grad_enabled():
        with torch.autocast(y.device.type, enabled=False):
            scaled = h * (weights @ expansion.to(weights.dtype)).to(h.dtype)
            y.view(-1, y.shape[-1]).addmm_(scaled, B.to(y.dtype))
        return y
    return _Expand.apply(y, h, weights, expansion.to(weights.dtype), B)


class _Expand(torch.autograd.Function):
    """`expand` with a hand-written backward: plain autograd would keep three (tokens, rank) tensors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, weights: Tensor, expansion: Tensor, B: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            scaled = h * (weights @ expansion).to(h.dtype)
            y.view(-1, y.shape[-1]).addmm_(scaled, B.to(y.dtype))
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, weights, expansion, B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, expansion, B = ctx.saved_tensors
        need_y, need_h, need_weights, _, need_B = ctx.needs_input_grad
        dh = dweights = dB = None
        with torch.autocast(dy.device.type, enabled=False):
            flat = dy.reshape(-1, dy.shape[-1]).to(h.dtype)
            factor = (weights @ expansion).to(h.dtype)
            if need_B:
                dB = ((h * factor).t() @ flat).to(B.dtype)
            if need_h or need_weights:
                du = flat @ B.to(h.dtype).t()
                if need_weights:
                    dweights = (du * h).to(weights.dtype) @ expansion.t()
                    if weights.shape[0] == 1:
                        dweights = dweights.sum(dim=0, keepdim=True)
                if need_h:
                    dh = du.mul_(factor)
        return (dy if need_y else None), dh, dweights, None, dB


class Float32Linear(torch.autograd.Function):
    """`x.float() @ W.float()ᵀ` that saves x in its own dtype: router logits in float32 at no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        compute = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(compute), weight.to(compute))

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        dx = dweight = None
        with torch.autocast(dlogits.device.type, enabled=False):
            if need_x:
                dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype)
            if need_weight:
                dweight = (dlogits.t() @ x.to(dlogits.dtype)).to(weight.dtype)
        return dx, dweight

"""The one hot path: h = x Aᵀ and the router logits in one pass over x, then y += (h ∘ g P) B in place.

A mixture is one wide LoRA whose rank space is scaled by the gate: every select, task id and static weight
differs only in how the gate's weights come about. Two small autograd Functions keep x, h and the weights, and
nothing else; parameters are cast to the dtype of the layer, x never is. See eval/bench for what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NOTHING = nullcontext()


def shrink(x: Tensor, factors: Sequence[Tensor], rows: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
    """`A x` of everything that reads x, side by side, and the router logits of x.

    Args:
        x: (..., d_in).
        factors: `A` (rank, d_in) of each, in the order of h's columns.
        rows: gate rows (expert, d_in), in the order of the logits' columns; each is multiplied on its own, so
            the logits of one never depend, not in the last bit, on how many others there are.

    Returns:
        h: (tokens, rank) in the dtype in which a linear layer would compute x here (autocast's, or x's).
        logits: (tokens, expert) in float32 (float64 for float64 x), whatever the autocast dtype; None
            without rows. Only their gradient goes back in h's dtype.
    """
    flat, dtype = flattened(x), linear_dtype(x)
    if torch.is_grad_enabled():
        return _Shrink.apply(flat, dtype, len(factors), *factors, *rows)
    low, exact = cast(flat, dtype), _logits(flat, rows) if rows else None
    if torch.compiler.is_compiling() and len(factors) > 1:
        # A compiled decoding step is bound by reading weights: it joins what comes out, not the factors.
        return torch.cat([F.linear(low, cast(factor, dtype)) for factor in factors], dim=-1), exact
    return F.linear(low, joined(factors, dtype)), exact


def scores(x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The router logits of `shrink` alone: (tokens, expert)."""
    flat = flattened(x)
    if torch.is_grad_enabled():
        return _Shrink.apply(flat, linear_dtype(x), 0, *rows)[1]
    return _logits(flat, rows)


def expand(y: Tensor, h: Tensor, weights: Tensor | None, expansion: Tensor, B: Sequence[Tensor]) -> Tensor:
    """Add the experts' outputs to y: `y + (h ∘ (weights · expansion)) B`.

    Args:
        y: (..., d_out) the base layer's output; overwritten where that is safe.
        h: (tokens, rank) all experts' `A x`, side by side.
        weights: (tokens, expert) or (1, expert) gate weights; None where h is weighted already.
        expansion: (expert, rank) each expert's scaling on its own columns, so that differing ranks
            and scalings cost nothing.
        B: stacks (rank, d_out) in the order of h's columns.
    """
    in_place = may_overwrite(y, h)
    if in_place and weights is None:
        y.view(-1, y.shape[-1]).addmm_(h, joined(B, h.dtype))
        return y
    if in_place and torch.is_grad_enabled():
        return _Expand.apply(y, h, weights, expansion, *B)
    with as_written(y):
        scaled = h if weights is None else h * _factor(weights, expansion, h.dtype)
        return y + (scaled @ joined(B, h.dtype)).to(y.dtype).reshape(y.shape)


def may_overwrite(y: Tensor, h: Tensor) -> bool:
    """Whether the base's output can take the experts' in place.

    A quantised layer may return its own dtype, or a view that autograd lets nobody write to (one made without gradients,
    or by a custom Function). In a compiled graph memory is the compiler's affair, and TorchScript traces no
    Function that writes in place.
    """
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if y.dtype != h.dtype or not y.is_contiguous() or in_graph:
        return False
    if not torch.is_grad_enabled() or not y._is_view():
        return True
    autograd = torch._C._autograd
    return bool(autograd._get_creation_meta(y) == autograd.CreationMeta.DEFAULT)


def weigh(h: Tensor, weights: Tensor, expansion: Tensor) -> Tensor:
    """`h ∘ (weights · expansion)`, (tokens, rank) in h's dtype; the product in brackets in the gate's float32."""
    if torch.is_autocast_enabled(h.device.type):
        with as_written(h):
            return weigh(h, weights, expansion)
    return h * _factor(weights, expansion, h.dtype)


def joined(stacks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Stacks below each other in `dtype`; a view where there is but one of that dtype."""
    if len(stacks) == 1:
        return stacks[0] if stacks[0].dtype == dtype else stacks[0].to(dtype)
    return torch.cat([cast(stack, dtype) for stack in stacks])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`. Where it has that, even `x.to` costs as much as a small product; what every layer runs in a decoding step
    (`joined`, `_factor`) is spared this call as well."""
    return x if x.dtype == dtype else x.to(dtype)


def flattened(x: Tensor) -> Tensor:
    """x (..., d) as rows (tokens, d)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes x here: autocast's, or x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def as_written(x: Tensor) -> AbstractContextManager[Any]:
    """Every dtype as the code says. Entering a context, even an empty one, costs microseconds: see `weigh`."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _logits(x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        with as_written(x):
            return _logits(x, rows)
    exact = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if len(rows) == 1:
        return F.linear(exact, cast(rows[0], exact.dtype))
    return torch.cat([F.linear(exact, cast(block, exact.dtype)) for block in rows], dim=-1)


def _factor(weights: Tensor, expansion: Tensor, dtype: torch.dtype) -> Tensor:
    """Each column's factor in rank space, (tokens, rank); the product is taken in the gate's float32."""
    factor = weights @ (expansion if expansion.dtype == weights.dtype else expansion.to(weights.dtype))
    return factor if factor.dtype == dtype else factor.to(dtype)


def _stack_gradients(columns: Tensor, inputs: Tensor, stacks: Sequence[Tensor], needed: Any) -> list[Any]:
    """Gradients `columnsᵀ inputs` of stacks that lie below each other: one GEMM, or only those needed."""
    sizes = [len(stack) for stack in stacks]
    if all(needed):
        parts: Any = (columns.t() @ inputs).split(sizes)
    else:
        split = columns.split(sizes, dim=1)
        parts = [part.t() @ inputs if need else None for part, need in zip(split, needed, strict=True)]
    return [None if g is None else g.to(stack.dtype) for g, stack in zip(parts, stacks, strict=True)]


class _Shrink(torch.autograd.Function):
    """`shrink` keeping x alone; dx of all factors and gates in one GEMM, and all their gradients in another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, factors: int, *weights: Tensor) -> Any:
        with as_written(x):
            flat = x.to(dtype)
            h = F.linear(flat, joined(weights[:factors], dtype)) if factors else None
            logits = _logits(x, weights[factors:]) if factors < len(weights) else None
        ctx.save_for_backward(flat, *weights)
        ctx.x_dtype = x.dtype
        return h, logits

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlogits: Tensor | None) -> Any:
        x, *weights = ctx.saved_tensors
        need_x, _, _, *needed = ctx.needs_input_grad
        with as_written(x):
            parts = [part.to(x.dtype) for part in (dh, dlogits) if part is not None]
            columns = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            dx = (columns @ joined(weights, x.dtype)).to(ctx.x_dtype) if need_x else None
            gradients = _stack_gradients(columns, x, weights, needed)
        return dx, None, None, *gradients


class _Expand(torch.autograd.Function):
    """`expand` with a hand-written backward: plain autograd would keep three (tokens, rank) tensors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, weights: Tensor, expansion: Tensor, *B: Tensor) -> Tensor:
        with as_written(y):
            scaled = h * _factor(weights, expansion, h.dtype)
            y.view(-1, y.shape[-1]).addmm_(scaled, joined(B, h.dtype))
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, weights, expansion, *B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, weights, expansion, *B = ctx.saved_tensors
        need_y, need_h, need_weights, _, *needed = ctx.needs_input_grad
        dh = dweights = None
        with as_written(dy):
            flat = dy.reshape(-1, dy.shape[-1]).to(h.dtype)
            factor = _factor(weights, expansion, h.dtype)
            gradients = _stack_gradients(h * factor, flat, B, needed) if any(needed) else [None] * len(B)
            if need_h or need_weights:
                du = flat @ joined(B, h.dtype).t()
                if need_weights:
                    dweights = (du * h).to(weights.dtype) @ expansion.to(weights.dtype).t()
                    if weights.shape[0] == 1:
                        dweights = dweights.sum(dim=0, keepdim=True)
                if need_h:
                    dh = du * factor
        return (dy if need_y else None), dh, dweights, None, *gradients

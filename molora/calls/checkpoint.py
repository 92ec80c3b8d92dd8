"""Gradient checkpointing: the recompute must route as the forward did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from molora.calls.context import RoutingContext
from molora.errors import ConfigError


class CheckpointWithRouting:
    """A checkpoint function that carries the call of its own forward into the recompute.

    The recompute runs in the backward pass: later, possibly after another forward, possibly in another
    thread. A context variable or a "last context" is wrong in each of these; a closure is not.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext) -> None:
        self.checkpoint = checkpoint
        self.context = context

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, call, runs = self.context, self.context.call, 0

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            with context.use_call(call.fork(recompute=runs > 1)):
                return function(*inner, **inner_kwargs)

        return self.checkpoint(run, *args, **kwargs)

    @property
    def use_reentrant(self) -> bool:
        """Whether the wrapped function is the reentrant checkpoint."""
        keywords = getattr(self.checkpoint, "keywords", {})
        return bool(keywords.get("use_reentrant", False))

    def refuse_lost_gradients(self) -> None:
        """Raise where auxiliary losses would silently get no gradient."""
        context = self.context
        if self.use_reentrant and any(context.adapters[a].config.aux_losses for a in context.active):
            raise ConfigError(
                "auxiliary losses get no gradient under reentrant gradient checkpointing.",
                hint='use gradient_checkpointing_kwargs={"use_reentrant": False}, or set aux_losses={}.',
            )

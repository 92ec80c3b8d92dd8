"""RoutingRequest: what a caller asks for, and how requests are laid over each other.

A request made with `molora.routing` belongs to the thread or asyncio task that made it: it is kept in a context
variable, so that two callers of one model never see each other's task ids. Contexts may overlap as well as nest:
leaving one takes out what it put in, wherever that is by now.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from molora.calls.task_map import TaskRef

TaskIdsLike = TaskRef | Sequence[TaskRef | Sequence[TaskRef]] | Tensor
Value = TypeVar("Value")


@dataclass(frozen=True)
class RoutingRequest:
    """What a caller asks for: task ids (one, or one per sample), restriction to them, forced experts, features."""

    task_ids: TaskIdsLike = None
    by: str | None = None
    experts: Mapping[str, float] | None = None
    given: bool = False  # task_ids=None may mean "not given" or "base only for every sample"
    features: Tensor | None = None  # (batch, d) or (batch, seq, d), for gates of external scope
    prompt_mask: Tensor | None = None  # (batch, seq) what gates of sequence scope pool
    prompt_length: int | None = None  # the same, of a generation: so many positions
    without: tuple[str, ...] = ()  # experts left out, as if they had never been added

    def over(self, outer: RoutingRequest) -> RoutingRequest:
        """This request, with what it leaves open taken from the outer one."""
        return RoutingRequest(
            task_ids=self.task_ids if self.given else outer.task_ids,
            by=self.by or outer.by,
            experts=self.experts if self.experts is not None else outer.experts,
            given=self.given or outer.given,
            features=self.features if self.features is not None else outer.features,
            prompt_mask=self.prompt_mask if self.prompt_mask is not None else outer.prompt_mask,
            prompt_length=self.prompt_length or outer.prompt_length,
            without=self.without or outer.without,
        )


NO_REQUEST = RoutingRequest()


class _Traced(threading.local, Generic[Value]):
    """The same entries by thread: what a graph that is being traced can read, which a context variable is not."""

    def __init__(self) -> None:  # once in every thread
        self.entries: tuple[tuple[object, Value], ...] = ()


class Scoped(Generic[Value]):
    """Values that hold while a `with` block runs, for one owner, in the thread or task that runs it.

    A compiled model reads those of its thread: asyncio tasks that call a compiled model by turns give their task ids
    with each call.
    """

    def __init__(self, name: str) -> None:
        self._entries: ContextVar[tuple[tuple[object, Value], ...]] = ContextVar(name, default=())
        self._traced: _Traced[Value] = _Traced()

    def of(self, owner: object) -> list[Value]:
        """The owner's values here, the outermost first."""
        entries = self._traced.entries if torch.compiler.is_compiling() else self._entries.get()
        return [value for holder, value in entries if holder is owner] if entries else []

    @contextmanager
    def hold(self, owner: object, value: Value) -> Iterator[None]:
        """Add a value for the time of the block."""
        entry = (owner, value)
        self._entries.set((*self._entries.get(), entry))
        self._traced.entries = (*self._traced.entries, entry)
        try:
            yield
        finally:
            self._entries.set(_without(self._entries.get(), entry))
            self._traced.entries = _without(self._traced.entries, entry)


def _without(
    entries: tuple[tuple[object, Value], ...], entry: tuple[object, Value]
) -> tuple[tuple[object, Value], ...]:
    return tuple(other for other in entries if other is not entry)

"""RoutingContext: what one model knows of its adapters and of the call that runs in this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from molora.calls.call import Call
from molora.calls.request import NO_REQUEST, RoutingRequest, Scoped
from molora.calls.statistics import RoutingRecord
from molora.calls.task_ids import TaskIds, resolve_ids
from molora.calls.task_map import TaskMap
from molora.config.mixture import SavedMixture
from molora.errors import RoutingError

FeatureSource = Callable[[list[list[int]]], Tensor]
"""Prompts, as lists of token ids -> features (sample, feature)."""


@dataclass
class AdapterRouting:
    """What calls must know of one adapter."""

    task_map: TaskMap
    config: SavedMixture
    router: Any = None  # the forward's TaskRouter, where the adapter has one
    read: nn.Module | None = None  # the block whose hidden states that reads
    along: bool = False  # whether that block says the same in the model's own forward: no expert comes before
    prompts: Any = None  # the forward's Prompts, where its experts have virtual tokens
    _partial: dict[tuple[str, ...], TaskMap] = field(default_factory=dict)

    def map_at(self, names: tuple[str, ...] | None) -> TaskMap:
        """The task map of a layer that has only the experts named; None: all of them."""
        if names is None:
            return self.task_map
        if names not in self._partial:
            self._partial[names] = self.task_map.only(names)
        return self._partial[names]


@dataclass(frozen=True)
class Asked:
    """A request, and its task ids by adapter, if it gives any."""

    request: RoutingRequest
    tasks: dict[str, TaskIds]


_ASKED: Scoped[Asked] = Scoped("molora_requests")
_RECORDERS: Scoped[RoutingRecord] = Scoped("molora_recorders")
_AUX_IN_LOSS: Scoped[bool] = Scoped("molora_aux_in_loss")


class _Here(threading.local):
    """What belongs to one thread: the call that runs in it, and what the last lone encoder call left."""

    def __init__(self) -> None:  # once in every thread
        self.call: Call | None = None
        # Outside of any root forward: what was asked when the call was made that layers share there.
        self.idle: tuple[list[Asked], list[str], Call] | None = None
        # Output of the last lone encoder call, and the base's encoding (two-pass gates).
        self.encoded: tuple[Tensor, Tensor, Tensor | None] | None = None


class RoutingContext:
    """One per model: its adapters, the last auxiliary losses, and the way to the current call.

    A plain object, not a module: it is absent from state dicts. Copying a model copies it once (the
    layers of the copy share the new one); nothing of a running forward is copied or pickled.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterRouting] = {}
        self.active: list[str] = []
        self.aux: dict[str, dict[str, Tensor]] | None = None  # adapter -> name -> unweighted value
        self.points: list[Any] | None = None  # cache of the root hook: layers that hold mounts
        self.checkpointed: list[nn.Module] | None = None
        self.source: FeatureSource | None = None
        self.labels_seen = False  # whether labels have been looked at: a GPU is asked once
        self.here = _Here()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        copy = RoutingContext()
        memo[id(self)] = copy
        # Deep, through memo: the configs the copied tuner has, not those of the original.
        copy.adapters = deepcopy(self.adapters, memo)
        copy.active, copy.source = list(self.active), self.source
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "active": self.active}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def forget_modules(self) -> None:
        """Drop the module caches; call after layers were added or removed."""
        self.points = self.checkpointed = None

    # -- the current call ------------------------------------------------------------------------------

    @property
    def call(self) -> Call:
        """The call that runs in this thread; outside of a root forward, one by what was asked for."""
        call = self.here.call
        return call if call is not None else self._idle()

    @contextmanager
    def use_call(self, call: Call) -> Iterator[None]:
        """Run a part of a forward under its own call, whatever the current one is."""
        before, self.here.call = self.here.call, call
        try:
            yield
        finally:
            self.here.call = before

    def _idle(self) -> Call:
        asked, idle = _ASKED.of(self), self.here.idle
        if idle is not None and _same(idle[0], asked) and idle[1] == self.active:
            return idle[2]
        request, tasks = self.asked()
        call = new_call(request, tasks)
        self.here.idle = asked, list(self.active), call
        return call

    # -- what was asked for ----------------------------------------------------------------------------

    def asked(self, own: RoutingRequest | None = None) -> tuple[RoutingRequest, dict[str, TaskIds]]:
        """The request in force, that of the call itself (`own`) over those of the contexts, and its task ids."""
        request: RoutingRequest = NO_REQUEST
        tasks: dict[str, TaskIds] = {}
        for outer in _ASKED.of(self):
            request = outer.request.over(request)
            tasks = outer.tasks if outer.request.given else tasks
        if own is not None:
            request = own.over(request)
            tasks = self.resolve(own) if own.given else tasks
        if request.given and set(tasks) != set(self.active):  # adapters were switched meanwhile
            tasks = self.resolve(request)
        return request, tasks

    def resolve(self, request: RoutingRequest) -> dict[str, TaskIds]:
        """Task ids for every active adapter; raises RoutingError for unknown tasks and experts."""
        tasks = {}
        for name in self.active:
            task_map = self.adapters[name].task_map
            if request.given:
                tasks[name] = resolve_ids(task_map, request.task_ids)
            for expert in (*(request.experts or ()), *request.without):
                if expert not in task_map.experts:
                    known = ", ".join(task_map.experts)
                    raise RoutingError(f"unknown expert {expert!r}. Known experts: {known}.")
        return tasks

    @contextmanager
    def use_request(self, request: RoutingRequest) -> Iterator[None]:
        """Make a request the default of every forward inside, in this thread or asyncio task."""
        with _ASKED.hold(self, Asked(request, self.resolve(request))):
            yield

    # -- who looks on ----------------------------------------------------------------------------------

    @property
    def recorders(self) -> list[RoutingRecord]:
        """Those that count this thread's or task's routings."""
        return _RECORDERS.of(self)

    @contextmanager
    def record(self, record: RoutingRecord) -> Iterator[None]:
        """Count routings of forwards inside."""
        with _RECORDERS.hold(self, record):
            yield

    @property
    def aux_in_loss(self) -> bool:
        """Whether auxiliary losses are added to `out.loss` here."""
        held = _AUX_IN_LOSS.of(self)
        return held[-1] if held else True

    @contextmanager
    def use_aux_in_loss(self, enabled: bool) -> Iterator[None]:
        """Switch the adding on or off for forwards inside."""
        with _AUX_IN_LOSS.hold(self, enabled):
            yield


def new_call(request: RoutingRequest, tasks: dict[str, TaskIds]) -> Call:
    """The facts of a call that follow from what was asked for."""
    features = {} if request.features is None else {"external": request.features}
    return Call(
        tasks=tasks,
        by_task=request.by == "task",
        experts=request.experts,
        without=request.without,
        features=features,
    )


def _same(one: list[Asked], other: list[Asked]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))

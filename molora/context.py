"""RoutingContext: what one forward call knows of tasks and masks, and how that survives checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from molora.errors import ConfigError, RoutingError
from molora.task_map import BASE_ONLY, TaskMap, TaskRef

TaskIdsLike = TaskRef | Sequence[TaskRef] | Tensor


@dataclass(frozen=True)
class RoutingRequest:
    """What a caller asks for: task ids (one, or one per sample), restriction to them, forced experts."""

    task_ids: TaskIdsLike = None
    by: str | None = None
    experts: Mapping[str, float] | None = None
    given: bool = False  # task_ids=None may mean "not given" or "base only for every sample"

    def over(self, outer: RoutingRequest) -> RoutingRequest:
        """This request, with what it leaves open taken from the outer one."""
        return RoutingRequest(
            task_ids=self.task_ids if self.given else outer.task_ids,
            by=self.by or outer.by,
            experts=self.experts if self.experts is not None else outer.experts,
            given=self.given or outer.given,
        )


@dataclass(frozen=True)
class TaskIds:
    """Resolved task ids: `ids` (batch,) or (batch, seq) int64; `single` where one id holds for all."""

    ids: Tensor
    single: int | None
    has_base: bool = True  # whether some id may be -1 (unknown while compiling)

    def without_shortcut(self) -> TaskIds:
        """The same ids, those for the base only routed like any others, with weight zero."""
        return replace(self, single=None) if self.single == BASE_ONLY else self

    def expand(self, lead: torch.Size) -> Tensor:
        """Ids of every token for an input of shape (*lead, d): (tokens,) int64.

        Beam search and several return sequences repeat each sample in place, so the batch may be a
        multiple of the ids given. Raises RoutingError when it is not.
        """
        ids = self.ids
        if ids.shape == lead:
            return ids.reshape(-1)
        if ids.dim() == 2 and lead.numel() == ids.numel() and len(lead) == 1:
            return ids.reshape(-1)
        if lead[0] % ids.shape[0]:
            raise RoutingError(
                f"got task ids for {ids.shape[0]} samples, but the batch has {lead[0]}; give one id per sample."
            )
        ids = ids.repeat_interleave(lead[0] // ids.shape[0], dim=0)
        if ids.dim() == 1:
            ids = ids.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
        elif len(lead) == 2 and ids.shape[1] >= lead[1]:  # a decoding step sees the newest positions only
            ids = ids[:, -lead[1] :]
        else:
            raise RoutingError(
                f"task ids of shape {tuple(self.ids.shape)} do not fit an input of shape {tuple(lead)}."
            )
        return ids.reshape(-1)


@dataclass
class RoutingState:
    """What the layers read during one forward; replaced, never shared, between forwards."""

    tasks: dict[str, TaskIds] = field(default_factory=dict)  # by adapter
    by_task: bool = False
    experts: Mapping[str, float] | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)  # "encoder" | "decoder" -> (batch, seq)
    owner: Any = (
        None  # the module whose forward opened this state; routings are shared and recorded only then
    )
    outer: RoutingState | None = None  # the state to return to
    recording: bool = False
    shared: dict[str, Any] = field(default_factory=dict)  # adapter -> what its last input group computed
    routings: dict[str, Any] = field(default_factory=dict)  # of gates that read nothing, by adapter and gate
    led: dict[str, Any] = field(default_factory=dict)  # of gates that layers with other inputs follow

    def fork(self, *, recompute: bool) -> RoutingState:
        """The same facts for a checkpointed region, without what is shared outside it.

        `led` is one for all regions: a leader writes it anew in every run of its region, before anyone reads.
        """
        return replace(self, shared={}, routings={}, recording=self.recording and not recompute)

    def mask(self, stream: str, lead: torch.Size) -> Tensor | None:
        """True for tokens that count, (tokens,), or None where the sequence has no mask that fits."""
        mask = self.masks.get(stream)
        if (
            mask is None
            or mask.dim() != 2
            or len(lead) != 2
            or mask.shape[1] < lead[1]
            or lead[0] % mask.shape[0]
        ):
            return None
        mask = mask[:, mask.shape[1] - lead[1] :]
        return mask.repeat_interleave(lead[0] // mask.shape[0], dim=0).reshape(-1).bool()


@dataclass
class AdapterRouting:
    """What the context must know of one adapter."""

    task_map: TaskMap
    config: Any  # the tuner's MoLoraConfig; opaque here, a later layer reads it

    @property
    def aux_losses(self) -> dict[str, Any]:
        return self.config.aux_losses


class RoutingContext:
    """One per model: the current state, the defaults set by `molora.routing`, the last aux losses.

    A plain object, not a module: it is absent from state dicts. Copying a model copies it once (the
    layers of the copy share the new one); nothing of a running forward is copied or pickled.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterRouting] = {}
        self.active: list[str] = []
        self.request = RoutingRequest()
        self.state = RoutingState()
        self.aux_in_loss = True
        self.aux: dict[str, dict[str, Tensor]] | None = None  # adapter -> name -> unweighted value
        self.recorders: list[Any] = []
        self.layers: list[tuple[str, Any]] | None = None  # cache of the root hook
        self.checkpointed: list[Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        copy = RoutingContext()
        memo[id(self)] = copy
        # Deep, through memo: the configs the copied tuner has, not those of the original.
        copy.adapters = deepcopy(self.adapters, memo)
        copy.active, copy.aux_in_loss = list(self.active), self.aux_in_loss
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "active": self.active, "aux_in_loss": self.aux_in_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def forget_modules(self) -> None:
        """Drop the module caches; call after layers were added or removed."""
        self.layers = self.checkpointed = None

    def resolve(self, request: RoutingRequest) -> RoutingState:
        """Names to ids for every active adapter; raises RoutingError for unknown tasks and experts."""
        tasks = {}
        for name in self.active:
            adapter = self.adapters[name]
            if request.given:
                tasks[name] = _resolve_ids(adapter.task_map, request.task_ids)
            for expert in request.experts or ():
                if expert not in adapter.task_map.experts:
                    known = ", ".join(adapter.task_map.experts)
                    raise RoutingError(f"unknown expert {expert!r}. Known experts: {known}.")
        return RoutingState(tasks=tasks, by_task=request.by == "task", experts=request.experts)

    @contextmanager
    def use_request(self, request: RoutingRequest) -> Iterator[None]:
        """Make a request the default of every forward inside, nested requests included."""
        previous, merged = (self.request, self.state), request.over(self.request)
        # generate() calls the encoder without the root forward: the state must hold outside it too.
        self.state = self.resolve(merged)
        self.request = merged
        try:
            yield
        finally:
            self.request, self.state = previous

    @contextmanager
    def use_state(self, state: RoutingState) -> Iterator[None]:
        """Run a checkpointed region under its own state, whatever the current one is."""
        previous, self.state = self.state, state
        try:
            yield
        finally:
            self.state = previous


def _resolve_ids(task_map: TaskMap, given: TaskIdsLike) -> TaskIds:
    if isinstance(given, Tensor):
        ids = given.reshape(1) if given.dim() == 0 else given
        if ids.is_floating_point() or ids.dim() > 2:
            raise RoutingError(
                f"task ids must be integers of shape (batch,) or (batch, seq), got {ids.dtype} {tuple(ids.shape)}."
            )
        if (
            torch.compiler.is_compiling()
        ):  # reading values would break the graph; the caller owns their validity
            return TaskIds(ids.long(), None)
        values = sorted(set(ids.flatten().tolist()))
        task_map.check(values)
        return TaskIds(ids.long(), values[0] if len(values) == 1 else None, BASE_ONLY in values)
    if given is None or isinstance(given, (str, int)):
        given = [given]
    resolved = [task_map.resolve(task) for task in given]
    if not resolved:
        raise RoutingError("task_ids is empty; give one name or id per sample.")
    return TaskIds(
        torch.tensor(resolved), resolved[0] if len(set(resolved)) == 1 else None, BASE_ONLY in resolved
    )


class CheckpointWithRouting:
    """A checkpoint function that carries the routing state of its own forward into the recompute.

    The recompute runs in the backward pass: later, possibly after another forward, possibly in another
    thread. A context variable or a "last context" is wrong in each of these; a closure is not.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext) -> None:
        self.checkpoint = checkpoint
        self.context = context

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, state, calls = self.context, self.context.state, 0

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            with context.use_state(state.fork(recompute=calls > 1)):
                return function(*inner, **inner_kwargs)

        return self.checkpoint(run, *args, **kwargs)

    @property
    def use_reentrant(self) -> bool:
        """Whether the wrapped function is the reentrant checkpoint."""
        keywords = getattr(self.checkpoint, "keywords", {})
        return bool(keywords.get("use_reentrant", False))

    def refuse_lost_gradients(self) -> None:
        """Raise where auxiliary losses would silently get no gradient."""
        if self.use_reentrant and any(self.context.adapters[a].aux_losses for a in self.context.active):
            raise ConfigError(
                "auxiliary losses get no gradient under reentrant gradient checkpointing.",
                hint='use gradient_checkpointing_kwargs={"use_reentrant": False}, or set aux_losses={}.',
            )


def base_only(ids: Tensor) -> Tensor:
    """Mask (tokens, 1) that is 0 for tokens that ask for the base model only."""
    return (ids != BASE_ONLY).unsqueeze(-1)

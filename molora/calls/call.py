"""RoutingContext: what one forward call knows of tasks and masks, and how that survives checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from molora.calls.task_map import BASE_ONLY, TaskMap, TaskRef
from molora.errors import ConfigError, RoutingError

TaskIdsLike = TaskRef | Sequence[TaskRef | Sequence[TaskRef]] | Tensor


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
        )


@dataclass(frozen=True)
class TaskIds:
    """Resolved task ids: `ids` (batch,) or (batch, seq) int64; `single` where one id holds for all.

    Samples of several tasks at once have the first of them in `ids`, and all of them in `several`.
    """

    ids: Tensor
    single: int | None
    has_base: bool = True  # whether some id may be -1 (unknown while compiling)
    several: Tensor | None = None  # (batch, task id) each sample's share of each task; rows sum to 1

    def without_shortcut(self) -> TaskIds:
        """The same ids, those for the base only routed like any others, with weight zero."""
        return replace(self, single=None) if self.single == BASE_ONLY else self

    def shares(self, size: int, device: torch.device) -> Tensor:
        """Each sample's share of each task id below `size`, (batch, task) float32; zero rows for the base only."""
        if self.several is not None:
            several = self.several.to(device)
            return torch.nn.functional.pad(several, (0, size - several.shape[1]))
        if self.ids.dim() != 1:
            raise RoutingError(
                "this gate learns from the task of a sample, but task ids were given per token; give one per sample."
            )
        ids = (self.ids if self.single is None else self.ids[:1]).to(device)
        return (ids.unsqueeze(-1) == torch.arange(size, device=device)).float()

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


def spread(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """Rows of samples (batch, ...) as rows of tokens, for an input of shape (*lead, d).

    One row serves everything, as many rows as tokens stay as they are. The batch may be a multiple of the rows:
    beams and several return sequences repeat each sample in place.
    """
    tokens = 1
    for size in lead:
        tokens *= size
    if len(rows) in (1, tokens):
        return rows
    if lead[0] % len(rows):
        raise RoutingError(
            f"got routing inputs for {len(rows)} samples, but the batch has {lead[0]}; give one per sample."
        )
    return rows.repeat_interleave(tokens // len(rows), dim=0)


@dataclass
class RoutingState:
    """What the layers read during one forward; replaced, never shared, between forwards."""

    tasks: dict[str, TaskIds] = field(default_factory=dict)  # by adapter
    by_task: bool = False
    experts: Mapping[str, float] | None = None
    features: dict[str, Tensor] = field(
        default_factory=dict
    )  # (batch, d) or (batch, seq, d); see `_features`
    masks: dict[str, Tensor] = field(default_factory=dict)  # "encoder" | "decoder" -> (batch, seq)
    targets: Tensor | None = None  # (batch, seq) true where a position of the decoder has a label
    prompt: Tensor | None = None  # (batch, seq) of the decoder: what gates of sequence scope pool
    kept: dict[str, Any] | None = None  # sequence routings of the prompt this call continues
    keep: dict[str, Any] | None = None  # those of this call's prompt, for calls that will continue it
    balances: dict[int, Tensor] = field(
        default_factory=dict
    )  # by gate: as the forward began, for recomputing
    worked_out: Tensor | None = None  # features that the context's source made of this call's prompt
    first_pass: bool = False  # the base runs alone, for features
    base_cache: Any = None  # the base's own key-value cache of this call's first pass
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

    def response(self, stream: str, lead: torch.Size) -> Tensor | None:
        """`mask`, only where the decoder has labels; the encoder has none of its own."""
        if stream != "decoder" or self.targets is None:
            return self.mask(stream, lead)
        if tuple(self.targets.shape) != tuple(lead):
            return self.mask(stream, lead)
        return self.targets.reshape(-1)

    def pooled(self, stream: str, lead: torch.Size) -> Tensor | None:
        """Mask (batch, seq) of the tokens a gate of sequence scope pools; None: all."""
        prompt = self.prompt if stream == "decoder" else None
        if prompt is not None and len(lead) == 2 and prompt.shape[1] != lead[1]:
            raise RoutingError(
                f"the prompt mask has {prompt.shape[1]} positions, the layer's input {lead[1]}.",
                hint="give routing_prompt_mask the shape (batch, seq) of the decoder's input.",
            )
        mask = prompt if prompt is not None else self.masks.get(stream)
        if mask is None or len(lead) != 2 or mask.shape[1] != lead[1] or lead[0] % mask.shape[0]:
            return None
        return mask.repeat_interleave(lead[0] // mask.shape[0], dim=0).bool()

    def read(self, stream: str, scope: str, lead: torch.Size) -> Tensor:
        """Features for an input of shape (*lead, d): (tokens or samples, feature).

        Raises:
            RoutingError: none were given, or they do not fit.
        """
        found = self.features.get(scope if scope == "external" else stream)
        if found is None:
            raise RoutingError(
                "this adapter's gate reads external features, but none were given.",
                hint="pass routing_features=... to the model, or use `with molora.routing(model, features=...)`.",
            )
        if found.dim() == 2:
            return found
        if len(lead) == 1:  # one vector per sample, as a pooler reads: that of the first position
            return found[:, 0]
        if found.shape[1] < lead[1]:
            raise RoutingError(
                f"routing features of {found.shape[1]} positions do not fit an input of {lead[1]}."
            )
        found = found[:, found.shape[1] - lead[1] :]  # a decoding step sees the newest positions only
        return found.repeat_interleave(lead[0] // len(found), dim=0).flatten(0, 1)


@dataclass
class AdapterRouting:
    """What the context must know of one adapter."""

    task_map: TaskMap
    config: Any  # the tuner's MoLoraConfig; opaque here, a later layer reads it
    _partial: dict[tuple[str, ...], TaskMap] = field(default_factory=dict)

    def map_at(self, names: tuple[str, ...] | None) -> TaskMap:
        """The task map of a layer that has only the experts named; None: all of them."""
        if names is None:
            return self.task_map
        if names not in self._partial:
            self._partial[names] = self.task_map.only(names)
        return self._partial[names]

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
        self.source: Any = None  # prompts (lists of token ids) -> features (sample, feature)
        self.encoded: Any = None  # the last lone encoder call: its output, and the base's (two-pass gates)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        copy = RoutingContext()
        memo[id(self)] = copy
        # Deep, through memo: the configs the copied tuner has, not those of the original.
        copy.adapters = deepcopy(self.adapters, memo)
        copy.active, copy.aux_in_loss, copy.source = list(self.active), self.aux_in_loss, self.source
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
        features = {} if request.features is None else {"external": request.features}
        return RoutingState(
            tasks=tasks, by_task=request.by == "task", experts=request.experts, features=features
        )

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
    if given is None or isinstance(given, (str, int)):
        given = [given]
    if (given.numel() if isinstance(given, Tensor) else len(given)) == 0:
        raise RoutingError("task_ids is empty; give one name or id per sample.")
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
    if any(isinstance(task, (list, tuple)) for task in given):
        return _several(task_map, [t if isinstance(t, (list, tuple)) else [t] for t in given])  # type: ignore[list-item]
    resolved = [task_map.resolve(task) for task in given]  # type: ignore[arg-type]
    return TaskIds(
        torch.tensor(resolved), resolved[0] if len(set(resolved)) == 1 else None, BASE_ONLY in resolved
    )


def _several(task_map: TaskMap, given: Sequence[Sequence[TaskRef]]) -> TaskIds:
    """Samples with several tasks each: every task has an equal share."""
    shares = torch.zeros(len(given), max([0, *task_map.ids.values()]) + 1)
    first = []
    for row, tasks in enumerate(given):
        if not tasks:
            raise RoutingError(f"sample {row} has an empty list of tasks; use None for the base only.")
        resolved = [task_map.resolve(task) for task in tasks]
        if BASE_ONLY in resolved and len(resolved) > 1:
            raise RoutingError(f"sample {row} asks for tasks and for the base only.")
        for task in resolved:
            if task != BASE_ONLY:
                shares[row, task] += 1 / len(resolved)
        first.append(resolved[0])
    return TaskIds(torch.tensor(first), None, BASE_ONLY in first, shares)


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

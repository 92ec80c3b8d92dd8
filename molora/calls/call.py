"""Call: the facts of one forward, which no layer changes, and CallCache: what its layers leave for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from molora.calls.prefix import Prefix
from molora.calls.record import GateRecord
from molora.calls.shapes import Shape
from molora.calls.task_ids import TaskIds
from molora.errors import RoutingError
from molora.experts.picks import Picks
from molora.gates.gate import Routing

Place = tuple[str, str]  # (adapter, module name): where a gate or a bank sits
Stream = tuple[
    str, str, str
]  # (adapter, module name, "encoder" | "decoder"): a gate, and whose tokens it reads


@dataclass(eq=False)
class PromptMemory:
    """What was decided on, and worked out from, a prompt: kept with the key-value cache that begins with it."""

    routings: dict[Place, Routing] = field(default_factory=dict)  # of gates of sequence scope
    logits: dict[Place, Tensor] = field(default_factory=dict)  # (batch, expert) of gates that are blended in
    features: Tensor | None = None  # (batch, feature) from the model's feature source
    tasks: dict[str, TaskIds] = field(default_factory=dict)  # by adapter: what its router named


class Part(Protocol):
    """What one layer of an input group adds to its base's output."""

    weights: Tensor | None  # over experts, of tokens, samples or all, where somebody may look

    def add(self, y: Tensor) -> Tensor:
        """Add it to y (batch, ..., d_out), which may be overwritten."""
        ...


@dataclass
class Projection:
    """What the linears that read one x computed together, by module name. Each layer takes its part away."""

    x: Tensor
    parts: dict[str, Part]


@dataclass
class Slots:
    """What the first linear of a mixed feed-forward decided for all of them."""

    weights: Tensor  # (tokens, slot), rows sum to 1
    picks: Picks  # (slot * row, 1) the expert of each slot's rows, samples or tokens; weight 0: the frozen feed-forward
    way: str  # in which all of them are computed
    lead: tuple[int, ...]  # (batch, ...) of the block's input

    @property
    def count(self) -> int:
        """How many slots there are."""
        return self.weights.shape[1]


@dataclass
class CallCache:
    """What layers of one forward leave for later ones, and for the losses; never shared between forwards."""

    projections: dict[str, Projection] = field(default_factory=dict)  # by adapter: of its last input group
    routings: dict[Stream, tuple[Routing, int]] = field(default_factory=dict)  # of gates that read nothing
    led: dict[Stream, tuple[Routing, int]] = field(
        default_factory=dict
    )  # of gates that other inputs' layers follow
    slots: dict[Place, Slots] = field(default_factory=dict)  # by mixed feed-forward
    records: dict[Place, GateRecord] = field(default_factory=dict)
    samples: dict[Place, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # (n, d_in) tokens, (n,) experts

    def fork(self) -> CallCache:
        """For a checkpointed region: what is shared between neighbours starts anew.

        What leads, and what is noted, is one for all regions: a leader writes it anew in every run of its region,
        before anyone reads.
        """
        return replace(self, projections={}, routings={})


@dataclass(frozen=True)
class Call:
    """The facts of one forward. Two calls at once, in two threads, are two objects."""

    tasks: Mapping[str, TaskIds] = field(default_factory=dict)  # by adapter
    by_task: bool = False
    experts: Mapping[str, float] | None = None
    without: tuple[str, ...] = ()  # experts left out
    features: Mapping[str, Tensor] = field(default_factory=dict)  # by stream, or "external"; see `read`
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # "encoder" | "decoder" -> (batch, seq)
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # the same; empty outside of a whole forward
    targets: Tensor | None = None  # (batch, seq) true where a position of the decoder has a label
    prompt: Tensor | None = None  # (batch, seq) of the decoder: what gates of sequence scope pool
    unprompted: Tensor | None = None  # (batch, 1) true for samples whose targets begin with their first token
    continued: PromptMemory | None = None  # of the prompt that this call continues
    begun: PromptMemory | None = None  # of this call's prompt, for calls that will continue it
    balances: Mapping[int, Tensor] = field(
        default_factory=dict
    )  # by gate: as the forward began, for recomputing
    unnamed: tuple[str, ...] = ()  # adapters that need task ids, were given none, and have a router
    prefix: Prefix | None = None  # the virtual tokens that this call's rows begin with
    first_pass: bool = False  # the base runs alone, for features
    stops_after: nn.Module | None = None  # the block after which such a run is not needed any more
    base_cache: object = None  # the base's own key-value cache of this call's first pass
    owner: nn.Module | None = None  # whose forward it is; routings are shared and recorded only then
    recording: bool = False
    # A lambda: a graph that is traced cannot call a class that it meets as a default.
    cache: CallCache = field(default_factory=lambda: CallCache())

    def fork(self, *, recompute: bool) -> Call:
        """The same facts for a checkpointed region, without what is shared outside it."""
        return replace(self, cache=self.cache.fork(), recording=self.recording and not recompute)

    def mask(self, stream: str, lead: torch.Size) -> Tensor | None:
        """True for tokens that count, (tokens,), or None where the sequence has no mask that fits."""
        mask = self._fitted(self.masks.get(stream), stream, lead)
        return None if mask is None else mask.reshape(-1)

    def unfit(self, stream: str, lead: torch.Size) -> bool:
        """Whether the call has a mask for this sequence, but nothing says what it leaves of the rows of this input."""
        given = self.masks.get(stream) is not None and len(lead) == 2 and bool(self.shapes)
        return given and self.mask(stream, lead) is None

    def _fitted(self, mask: Tensor | None, stream: str, lead: torch.Size) -> Tensor | None:
        """A mask of the call as one of the rows of an input of shape (*lead, d), (batch, seq) bool."""
        shape = self.shapes.get(stream)
        if len(lead) != 2 or (mask is not None and mask.dim() != 2):
            return None
        if shape is not None:
            mask = shape.fitted(mask, lead[1])
        elif mask is not None and mask.shape[1] != lead[1]:
            return None
        if mask is None or lead[0] % mask.shape[0]:
            return None
        return mask.repeat_interleave(lead[0] // mask.shape[0], dim=0).bool()

    def response(self, stream: str, lead: torch.Size) -> Tensor | None:
        """`mask`, only where the decoder has labels; the encoder has none of its own."""
        if stream != "decoder" or self.targets is None or tuple(self.targets.shape) != tuple(lead):
            return self.mask(stream, lead)
        return self.targets.reshape(-1)

    def pooled(self, stream: str, lead: torch.Size) -> Tensor | None:
        """Mask (batch, seq) of the tokens a gate of sequence scope pools; None: all."""
        prompt = self.prompt if stream == "decoder" else None
        own = self.shapes.get(stream)
        whole = own is None or own.seq == lead[-1]
        if prompt is not None and len(lead) == 2 and whole and prompt.shape[1] != lead[1]:
            raise RoutingError(
                f"the prompt mask has {prompt.shape[1]} positions, the layer's input {lead[1]}.",
                hint="give routing_prompt_mask the shape (batch, seq) of the decoder's input.",
            )
        return self._fitted(prompt if prompt is not None else self.masks.get(stream), stream, lead)

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

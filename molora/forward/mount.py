"""Mount: one adapter at one layer, all that the forward path sees of both; and which mounts compute together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from molora.calls.call import Call, Place
from molora.calls.context import AdapterRouting, RoutingContext
from molora.calls.decide import experts_in_use
from molora.calls.task_map import TaskMap
from molora.config.mixture import SavedMixture
from molora.experts.bank import ExpertBank
from molora.experts.stack import Stack, blocks_of
from molora.forward.prompts import Prompts
from molora.forward.task_router import TaskRouter
from molora.gates.gate import Gate
from molora.gates.rows import GateRows

PLAIN = "plain"
"""The slot of ordinary LoRAs, whose weight is 1."""


@dataclass(eq=False)
class Mount:
    """One adapter's experts at one layer. Plain data, not part of any state dict.

    A group of mounts shares one gate, which belongs to the group's first member, the leader.
    """

    adapter: str
    key: str  # module name in the base model
    stream: str  # whose padding mask fits: "encoder" | "decoder"
    d_in: int
    context: RoutingContext
    bank: ExpertBank
    gate: Gate | None = None  # its own, where it leads a group whose weights are learned
    router: TaskRouter | None = None  # the adapter's, at the first layer of it
    prompts: Prompts | None = None  # the adapter's, the same
    plain: bool = False  # one ordinary LoRA, no gate
    names: tuple[str, ...] | None = None  # the experts this layer has, where that is not all of them
    frozen_rows: tuple[bool, ...] = ()  # per expert of the layer, whether its gate row is frozen
    reads_input: bool = True  # whether the gate's answer depends on x
    pools: bool = False  # it reads the sequence, pooled
    factors: bool = False  # experts are mixed by their factors, one LoRA per sample
    feed_forward: str | None = None  # the name of the feed-forward whose outputs are mixed as a whole
    leaves: bool = False  # the last linear of that feed-forward
    time_first: bool = False  # its input is (seq, batch, d): known by the model's type, or seen
    group: list[Mount] = field(default_factory=list)  # share one gate; the leader comes first
    spreads: bool = False  # the group goes beyond one input: all follow what the gate read at the leader
    inputs: InputGroup = field(default_factory=lambda: InputGroup())  # the mounts that read the same x

    routing: AdapterRouting = field(init=False)
    config: SavedMixture = field(init=False)
    task_map: TaskMap = field(init=False)  # the tasks and experts of this layer

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Look up the adapter as it is now: growing replaces it."""
        self.inputs.plans.clear()
        self.routing = self.context.adapters[self.adapter]
        self.config, self.task_map = self.routing.config, self.routing.map_at(self.names)

    @property
    def place(self) -> Place:
        return self.adapter, self.key

    @property
    def leader(self) -> Mount:
        """The mount whose gate decides here."""
        return self.group[0]

    def experts(self, call: Call) -> tuple[int, ...] | None:
        """The experts of this layer that a call is limited to; None: any of them."""
        return experts_in_use(self.task_map, call.tasks.get(self.adapter), call, self.config.gate)


@dataclass
class GroupOperands:
    """What a plan multiplies by, for the experts in use."""

    A: list[torch.Tensor]  # stacks (rank, d_in), those of the members below each other
    tiles: list[tuple[int, int]] | None  # where some members share A: (columns of their product, copies)
    widths: list[int]  # columns of h that belong to each member
    B: dict[str, list[torch.Tensor]]  # by site: stacks (rank, d_out)
    expansions: dict[str, torch.Tensor]  # by site: (expert, rank)
    joint: (
        torch.Tensor | None
    )  # without gradients: (expert, rank) from the weights of all gates to all columns
    deviations: dict[str, torch.Tensor] = field(default_factory=dict)  # by site: of output scales from 1


class Kept:
    """What the steps of a decoding multiply by, good as long as what it was made from is the same.

    Writing to a Parameter, moving it or putting another in its place shows here, writing through `.data` does not.
    """

    def __init__(self, facts: tuple[object, ...], stacks: Sequence[Stack], value: Any) -> None:
        self.facts, self.stacks, self.value = facts, stacks, value
        self.blocks = blocks_of(stacks)
        # Tensors made in inference mode count no writings.
        self.counted = [block for block in self.blocks if not block.is_inference()]
        self.places = [block.data_ptr() for block in self.blocks]
        self.versions = [block._version for block in self.counted]

    def holds(self, facts: tuple[object, ...]) -> bool:
        """Whether it is what these facts, and the Parameters as they are, would give."""
        if facts != self.facts:
            return False
        now = blocks_of(self.stacks)
        if len(now) != len(self.blocks) or not all(map(is_, now, self.blocks)):
            return False
        moved = [block.data_ptr() for block in now] != self.places
        return not moved and [block._version for block in self.counted] == self.versions


@dataclass
class Plan:
    """The mounts that compute together, and whose gates decide for them; looked up once."""

    members: list[Mount]
    stream: str  # whose tokens its members read
    slots: list[str]  # per member, whose weights it uses: the key of the leader, or PLAIN
    leaders: dict[str, Mount]  # by slot
    readers: dict[str, tuple[Gate, GateRows | None]]  # by slot: gates that read this input, and their rows
    way: tuple[tuple[object, ...], Any] | None = None  # what led to the way it last computed in, and that way
    kept: Kept | None = None  # of the last decoding step

    @classmethod
    def of(cls, members: Sequence[Mount]) -> Plan:
        slots = [PLAIN if mount.plain else mount.leader.key for mount in members]
        leaders = {mount.leader.key: mount.leader for mount in members if not mount.plain}
        return cls(
            members=list(members),
            stream=members[0].stream,
            slots=slots,
            leaders=leaders,
            readers={
                slot: (leader.gate, leader.gate.rows)
                for slot, leader in leaders.items()
                if leader.gate is not None
                and leader.reads_input
                and (leader in members or not leader.spreads)
            },
        )

    def keep(self, facts: tuple[object, ...], value: Any) -> Any:
        """Keep, for as long as `facts` and the members' Parameters stay as they are, and return it."""
        stacks = [stack for member in self.members for stack in member.bank.named_stacks().values()]
        self.kept = Kept(facts, stacks, value)
        return value


@dataclass
class InputGroup:
    """One adapter's mounts that read the same input, in the model's order.

    Whichever is called first computes for all of them. A layer that is then called with another x computes for itself:
    nothing is assumed of the attention code, and nothing in it is changed.
    """

    members: list[Mount] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)  # by key of a mount alone; "" for the whole group

    def plan(self, mount: Mount, *, alone: bool, traced: bool = False) -> Plan:
        """The plan of the whole group, or of one of its mounts."""
        name = mount.key if alone else ""
        plan = None if traced else self.plans.get(name)  # a cache that tracing fills compiles the model twice
        if plan is None:
            plan = Plan.of([mount] if alone else self.members)
            if not traced:
                self.plans[name] = plan
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "plans": {}}


class MountPoint:
    """What holds mounts: an adapted layer, as the forward path sees it."""

    context: RoutingContext
    mounts: dict[str, Mount]  # by adapter

    if TYPE_CHECKING:  # PEFT's layer class has them

        @property
        def active_adapters(self) -> list[str]: ...

        @property
        def disable_adapters(self) -> bool: ...

        @property
        def merged(self) -> bool: ...

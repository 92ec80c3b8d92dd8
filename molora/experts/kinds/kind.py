"""Kind: what a kind of expert has of its own, how that starts, and which factors the kernel multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from molora.config.section import Problem
from molora.experts.stack import Stack


class Expert(NamedTuple):
    """One expert's factors, without padding: `A` (rank, d_in), `B` (d_out, rank), and its scaling."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Its weight update `scaling · B A`, (d_out, d_in)."""
        return self.scaling * (self.B @ self.A)


class ExpertRows(NamedTuple):
    """One expert's own parameters: its row of every stack, without padding; rank and scaling."""

    rows: Mapping[str, Tensor]
    rank: int
    scaling: float

    def alone(self) -> dict[str, Tensor]:
        """Rows of every stack, (1, ...), of this expert only."""
        return {name: row.unsqueeze(0) for name, row in self.rows.items()}


class About(NamedTuple):
    """What `molora kinds` and the documentation say of a kind."""

    paper: str
    trains: str  # for each expert, or for all
    when: str  # to use it


@dataclass(frozen=True)
class StackSpec:
    """What one stack of a kind holds.

    axes: of a row in memory; the axis `rank` is padded with zeros where ranks differ.
    on_disk: the same axes as they are saved, where the order differs.
    shared: one row serves all experts. It is frozen as soon as one of them is: a frozen expert must not change.
    trained: whether it learns at all.
    role: "A" or "B", whose learning rate it has.
    """

    axes: str
    on_disk: str | None = None
    shared: bool = False
    trained: bool = True
    role: str = "A"


class Place(NamedTuple):
    """The shape of the factors at one layer."""

    d_in: int
    d_out: int
    rank: int  # of the first expert there


class Step(NamedTuple):
    """A step of the optimiser, just made."""

    number: int | None = None  # from 1; None: one more than the last
    total: int | None = None  # how many there will be; None: not known
    loss: Callable[[], Tensor] | None = None  # computes that of its last batch again; None: the caller cannot
    optimizer: Optimizer | None = None  # None: the caller does not say


class Base(Protocol):
    """A layer's frozen base, as a kind of expert may see it."""

    @property
    def is_meta(self) -> bool:
        """Whether its values are not here yet."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """(d_out,)."""
        ...

    def weight(self) -> Tensor:
        """(d_out, d_in), in floating point."""
        ...

    def stamp(self) -> Any:
        """Changes with the weight."""
        ...


class Kind:
    """One kind of expert, for all layers of an adapter.

    Args:
        share_A: all experts of a layer have one A.
        settings: the kind's own, as in `settings`; those left out have their defaults.
    """

    about: ClassVar[About]
    settings: ClassVar[Mapping[str, int | float | str]] = {}  # its own settings with their defaults
    scaling: ClassVar[float | None] = None  # of its experts, where the config names no rule and no number
    keeps_factors: ClassVar[bool] = False  # whether its stacks A and B are the factors
    one_A: ClassVar[bool] = False  # whether all experts of a layer read x through one A
    starts_by_init: ClassVar[bool] = True  # whether A starts as the config's `init` says
    scales_output: ClassVar[bool] = False  # whether its experts multiply the base's output
    one_rank: ClassVar[bool] = False  # whether all experts of a layer have one rank
    by_layer: ClassVar[bool] = False  # whether each layer has an object of it, which knows the layer
    place: Place | None = None  # then
    base: Base | None = None  # where it `scales_output`
    orthonormal: ClassVar[bool] = False  # whether A and B are sets of vectors that should be orthonormal
    grows: ClassVar[bool] = False  # whether an expert may get more rows of its rank in training
    upper: ClassVar[frozenset[str]] = frozenset()  # stacks that learn on a half of the data of their own
    imports: ClassVar[str | None] = None  # why the factors of an ordinary LoRA cannot become its parameters

    averages: ClassVar[str | None] = (
        None  # why the mean of updates cannot, where `imports` has nothing against it
    )

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        self.shares_A = share_A or self.one_A
        self.chosen: dict[str, Any] = {**self.settings, **settings}
        self.stacks = self.specs()

    def specs(self) -> dict[str, StackSpec]:
        """Its stacks by name, in the order in which they are saved."""
        raise NotImplementedError

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """How a new expert starts: its row of every stack, laid out as in memory.

        `init_A` fills an `A` (rank, d_in) at random as the config says.
        """
        raise NotImplementedError

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`A` (expert, rank, d_in), (1, rank, d_in) where it is shared, and `B` (expert, rank, d_out) of some experts.

        `rows` has theirs of every stack, (expert, ...), or (1, ...) of a shared one. Called in every forward: a kind
        returns views, or builds factors, which are small beside activations, with their gradients.
        """
        raise NotImplementedError

    def at(self, place: Place, base: Base | None) -> Self:
        """This kind at one layer, where it is `by_layer`; `base` where it `scales_output`."""
        found = type(self)(self.shares_A, **self.chosen)
        found.place, found.base = place, base
        return found

    def output_scale(self, rows: Mapping[str, Tensor], scalings: Sequence[float]) -> Tensor:
        """What each expert multiplies the layer's output by, (expert, d_out), where it `scales_output`.

        `rows` as of `factors`; `scalings` of the same experts.
        """
        raise NotImplementedError

    def after_step(self, banks: Mapping[str, Any], at: Step) -> None:
        """Look at weights and gradients of an adapter after an optimiser's step; see `molora.after_step`.

        Args:
            banks: of all layers, by their names.
            at: which step, and what it was made with.
        """

    @classmethod
    def undone(cls, settings: Mapping[str, Any], steps: int) -> str | None:
        """What a training of so many steps never comes to, as the end of a sentence; None where it comes to all.

        Args:
            settings: its own, all of them.

        Raises ConfigError where it cannot train for so few.
        """
        return None

    def rate(self, step: int) -> float:
        """What the experts' learning rate is multiplied by at a step (0 = the first), beside the schedule."""
        return 1.0

    def state(self) -> dict[str, Any]:
        """What it has to remember between steps, as plain data; nothing, for most kinds."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""

    def rows_of(self, expert: Expert) -> dict[str, Tensor]:
        """The rows of an expert with these factors; only where `imports` gives no reason against it."""
        raise NotImplementedError

    def stack(self, name: str, rows: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Stack:
        """A new Stack of that name from a Stack's arguments, in a bank whose first expert has these rows."""
        return Stack(*args, **kwargs)

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        """What of a mixture's other settings does not go with this kind.

        Args:
            mixture: combine, share_A, task_cores, ffn_targets, init and aux_losses of the adapter.
        """
        for name in ("share_A", "task_cores"):
            if mixture[name]:
                yield (name,), "goes with kind: lora only."
        if mixture["init"] == "svd_segments":
            yield ("init",), "'svd_segments' goes with kind: lora only."
        for name in ("orthogonal", "expert_similarity"):
            if name in mixture["aux_losses"]:
                yield (
                    ("aux_losses", name),
                    "compares the factors of experts, which only kind: lora trains freely.",
                )


def padded(row: Tensor, axes: str, missing: int) -> Tensor:
    """A row with zeros for `missing` more of its rank."""
    names = axes.split()
    if not missing or "rank" not in names:
        return row
    return F.pad(row, [0, 0] * (len(names) - 1 - names.index("rank")) + [0, missing])

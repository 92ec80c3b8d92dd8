"""ExpertBank: one layer's experts, a Kind and its Stacks, and the one way from x to their outputs.

    x (tokens, d_in) ── A of all experts ──> h (tokens, Σ rank) ── ∘ weights ── B of all experts ──> added to y

For example, 3 experts of ranks 2, 2, 2 between d_in = 16 and d_out = 32, the second one frozen, and 5 tokens:

    stack A       frozen (1, 2, 16)      trainable (2, 2, 16)       on disk (3, 2, 16)
    stack B       frozen (1, 2, 32)      trainable (2, 2, 32)       on disk (3, 32, 2)
    operands      A: [(2, 16), (4, 16)]  B: [(2, 32), (4, 32)]      views of the stacks, frozen ones first
    h = x Aᵀ      (5, 6)                 columns of expert 1, then of 0 and 2
    expansion     (3, 6)                 row e has expert e's scaling in its own columns, 0 elsewhere
    y += (h ∘ (weights (5, 3) · expansion)) B                       (5, 32)

Axis vocabulary, everywhere in molora: batch seq tokens d_in d_out expert rank task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.experts.cores import TaskCores
from molora.experts.kernel import expand, shrink
from molora.experts.kinds.kind import Expert, ExpertRows, Kind, StackSpec, padded
from molora.experts.kinds.lora import Lora
from molora.experts.output_scale import built, factors_of, mixed, rescaled
from molora.experts.stack import Stack, Stacked

__all__ = ["Expert", "ExpertBank", "ExpertRows", "Operands"]


class Operands(NamedTuple):
    """What the kernel multiplies for the experts in use."""

    A: list[Tensor]  # stacks (rank, d_in), below each other
    B: list[Tensor]  # stacks (rank, d_out), in the order of h's columns
    expansion: Tensor  # (expert, rank): the scalings of each expert on its own columns
    copies: int  # how often the product of x and A stands in h: once, or for each expert that shares A
    deviation: Tensor | None = None  # (expert, d_out): how far each expert's output scale is from 1


class ExpertBank(Stacked):
    """Experts of one layer: given x and weights over experts, adds their outputs to the base's.

    Ranks may differ: shorter experts are padded with zeros, which never get a gradient.

    Args:
        experts: in order, by their own rows or by their factors.
        frozen: for each, whether it learns no more.
        dropout: on x, in training.
        kind: what their parameters are; an ordinary LoRA each.
        cores: between A and B, where tasks have them.
    """

    stacks: Mapping[str, Stack]

    def __init__(
        self,
        experts: Sequence[Expert | ExpertRows],
        frozen: Sequence[bool],
        dropout: float = 0.0,
        *,
        kind: Kind | None = None,
        cores: TaskCores | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind or Lora()
        self._by_name: dict[str, Stack] = {}  # found without nn.Module's search, in every forward
        self._modules["stacks"] = nn.ModuleDict()
        self.cores = cores
        self.dropout_p = dropout
        self.dropout = nn.Dropout(dropout)
        self.assign(experts, frozen)

    def named_stacks(self) -> Mapping[str, Stack]:
        return self.__dict__.get("_by_name", {})

    def assign(self, experts: Sequence[Expert | ExpertRows], frozen: Sequence[bool]) -> None:
        """Replace all experts; optimisers have to be built anew."""
        members = [self._taken_apart(e) if isinstance(e, Expert) else e for e in experts]
        self.ranks = tuple(member.rank for member in members)
        self.scalings = tuple(member.scaling for member in members)
        self.frozen = tuple(i for i, is_frozen in enumerate(frozen) if is_frozen)
        self.trainable = tuple(i for i, is_frozen in enumerate(frozen) if not is_frozen)
        for name, spec in self.kind.stacks.items():
            self._assign_stack(name, spec, members)
        self._filled()

    def _taken_apart(self, expert: Expert) -> ExpertRows:
        return ExpertRows(self.kind.rows_of(expert), expert.rank, expert.scaling)

    def _assign_stack(self, name: str, spec: StackSpec, members: Sequence[ExpertRows]) -> None:
        blocks: tuple[tuple[int, ...], ...] = self.frozen, self.trainable
        if spec.shared:
            held = [bool(self.frozen) or not spec.trained]
            rows, blocks = members[0].rows[name].unsqueeze(0), ((0,), ()) if held[0] else ((), (0,))
        else:
            held = [i in self.frozen or not spec.trained for i in range(len(members))]
            rows = torch.stack([padded(m.rows[name], spec.axes, max(self.ranks) - m.rank) for m in members])
        if name in self._by_name:
            self._by_name[name].assign(rows, blocks, held)
            return
        stack = self.kind.stack(
            name, members[0].rows, rows, blocks, held,
            names=(f"frozen_{name}", f"lora_{name}"),  # PEFT's own tools find A and B by such names
            axes=None if spec.on_disk is None else (spec.on_disk, spec.axes),
            role=spec.role,
        )  # fmt: skip
        self._by_name[name] = stack
        self.get_submodule("stacks").add_module(name, stack)

    @property
    def is_meta(self) -> bool:
        """Whether its values are not here."""
        return next(iter(self._by_name.values())).is_meta

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    # -- reading ---------------------------------------------------------------------------------------

    def row(self, index: int) -> ExpertRows:
        """One expert's own parameters, as views without the padding."""
        rank, is_frozen, rows = self.ranks[index], index in self.frozen, {}
        position = (self.frozen if is_frozen else self.trainable).index(index)
        for name, spec in self.kind.stacks.items():
            stack = self._by_name[name]
            block = stack.blocks[0] if spec.shared else stack.frozen if is_frozen else stack.trainable
            row = block[0 if spec.shared else position]  # type: ignore[index]
            rows[name] = row[:rank] if spec.axes.startswith("rank") and rank < len(row) else row
        return ExpertRows(rows, rank, self.scalings[index])

    def rows(self) -> list[ExpertRows]:
        """Every expert's own parameters, in expert order: what `assign` takes."""
        return [self.row(i) for i in range(self.num_experts)]

    def expert(self, index: int) -> Expert:
        """One expert's factors, without the padding."""
        return self.effective(self.row(index))

    def effective(self, member: ExpertRows) -> Expert:
        """The factors of an expert with these parameters."""
        A, B, _ = built(self.kind, member.alone(), [member.scaling])
        return Expert(A[0], B[0].t(), member.scaling)

    def experts(self) -> list[Expert]:
        """Every expert's factors, in expert order."""
        return [self.expert(i) for i in range(self.num_experts)]

    def at_task(self, shares: Tensor | None) -> list[Expert]:
        """`experts` with the core of one sample's tasks (1, task) multiplied into A."""
        if self.cores is None or shares is None:
            return self.experts()
        core = self.cores.matrices(shares)[0]
        return [e._replace(A=core.to(e.A.dtype) @ e.A) for e in self.experts()]

    def delta(self, weights: Sequence[float] | Tensor, shares: Tensor | None = None) -> Tensor:
        """Weight update (d_out, d_in) of a static mixture, at a task (1, task) where it has cores; float32 or better.

        That of the factors, and what output scales make of the base's weight.
        """
        total = None
        for weight, expert in zip(weights, self.at_task(shares), strict=True):
            compute = torch.promote_types(expert.A.dtype, torch.float32)
            part = weight * expert._replace(A=expert.A.to(compute), B=expert.B.to(compute)).delta()
            total = part if total is None else total + part
        assert total is not None
        deviation = self.deviation(weights)
        if deviation is None or self.kind.base is None:
            return total
        return total + deviation.to(total).unsqueeze(1) * self.kind.base.weight().to(total)

    def deviation(self, weights: Sequence[float] | Tensor) -> Tensor | None:
        """How far a static mixture's output scale is from 1, (d_out,); None: a kind that leaves the base's output alone."""
        if not self.kind.scales_output:
            return None
        one = [built(self.kind, row.alone(), [row.scaling]).deviation for row in self.rows()]
        each = torch.cat([part for part in one if part is not None])
        return mixed(torch.as_tensor(weights, dtype=each.dtype, device=each.device)[None], each)[0]

    # -- computing -------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        experts: tuple[int, ...] | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Add `Σ_e weights_e · scaling_e · B_e A_e drop(x)` to y.

        Args:
            x: (..., d_in) the layer's input.
            y: (..., d_out) the base layer's output; may be overwritten.
            weights: (tokens, expert) or (1, expert).
            experts: indices the columns of `weights` stand for; None = all of them. Only these are
                computed, so other experts cannot change the result.
            shares: (sample, task) each sample's share of each task, where tasks have cores.
        """
        operands = self.operands(experts, x)
        h = self.shrunk(x, operands, shares)
        if operands.deviation is not None:
            assert self.kind.base is not None
            y = rescaled(y, mixed(weights, operands.deviation), self.kind.base.bias)
        return expand(y, h, weights, operands.expansion, operands.B)

    def operands(self, experts: tuple[int, ...] | None, x: Tensor) -> Operands:
        """What the kernel multiplies for all experts, or only for those of `experts`."""
        parts = [*self._blocks()] if experts is None else [self.row(i).alone() for i in experts]
        order = self.frozen + self.trainable if experts is None else experts
        factors, deviation = factors_of(self.kind, parts, order, self.scalings, whole=experts is None)
        shared = self.kind.shares_A
        A = [A.flatten(0, 1) for A, _ in (factors[:1] if shared else factors)]
        B = [B.flatten(0, 1) for _, B in factors]
        copies = 1 if not shared else self.num_experts if experts is None else len(experts)
        return Operands(A, B, self.expansion(experts, x), copies, deviation)

    def shared_h(self, x: Tensor, copies: int = 1, shares: Tensor | None = None) -> Tensor:
        """h (tokens, copies * rank) where all experts share A; `shares` as of `forward`."""
        return self.spread(shrink(x, self.operands((0,), x).A)[0], copies, shares)

    def shrunk(self, x: Tensor, operands: Operands, shares: Tensor | None = None) -> Tensor:
        """h (tokens, rank) of `kernel.expand`, from x (..., d_in)."""
        return self.spread(shrink(self.dropout(x), operands.A)[0], operands.copies, shares)

    def spread(self, h: Tensor, copies: int, shares: Tensor | None) -> Tensor:
        """From the product of x and the stacks of A to h: through the tasks' cores, once for each expert that shares A."""
        if self.cores is not None and shares is not None:
            h = self.cores(h, shares)
        return h if copies == 1 else h.repeat(1, copies)

    def _blocks(self) -> Iterator[dict[str, Tensor]]:
        """Rows of every stack for the frozen experts, and for those that are trained."""
        for place, members in enumerate((self.frozen, self.trainable)):
            if members:
                yield {
                    name: stack.blocks[0]
                    if self.kind.stacks[name].shared
                    else stack.blocks[place if self.frozen else 0]
                    for name, stack in self._by_name.items()
                }

    def expansion(self, experts: tuple[int, ...] | None, x: Tensor) -> Tensor:
        """`P (expert, rank)` of `kernel.expand`: row = column of the weights, columns as in the stacks.

        Built here, not a buffer: a buffer would be rounded by `model.to(bfloat16)` and lost on meta.
        """
        key = (experts, x.device, x.dtype == torch.float64)
        if key in self._expansions:
            return self._expansions[key]
        order = self.frozen + self.trainable if experts is None else experts
        rows = experts if experts is not None else tuple(range(self.num_experts))
        widths = [self.ranks[i] if experts is not None else max(self.ranks) for i in order]
        dtype = torch.float64 if key[-1] else torch.float32
        expansion = torch.zeros(len(rows), sum(widths), dtype=dtype, device=x.device)
        for index, start in zip(order, accumulate(widths, initial=0), strict=False):
            expansion[rows.index(index), start : start + self.ranks[index]] = self.scalings[index]
        if not torch.compiler.is_compiling():  # tensors made while a graph is traced are symbols
            if len(self._expansions) > 4 * self.num_experts:
                self._expansions.clear()  # batches of ever new sets of tasks
            self._expansions[key] = expansion
        return expansion

    def rescale(self, scalings: Sequence[float]) -> ExpertBank:
        """Give the experts other scalings, in expert order, until they are assigned anew."""
        self.scalings = tuple(scalings)
        self._filled()
        return self

    def _filled(self) -> None:
        """Make the usual expansions now: made in a compiled graph, they would be made at every step."""
        self._expansions: dict[Any, Tensor] = {}
        self._expand()

    def _expand(self) -> None:
        if not self.is_meta:
            like = next(iter(self._by_name.values())).blocks[0]
            for experts in (None, *((i,) for i in range(self.num_experts))):
                self.expansion(experts, like.detach())

    def apply_freeze(self) -> None:
        """What is frozen stays frozen, whatever marked the adapter as trainable."""
        for stack in (*self._by_name.values(), *(() if self.cores is None else (self.cores,))):
            stack.apply_freeze()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._expand()  # for another device or precision; most calls change neither
        return self

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, ranks={self.ranks}, frozen={self.frozen}"

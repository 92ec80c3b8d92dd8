"""Scores: a gate for each way to turn what it reads into router logits. One class and one registry line each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.config.choices import SCORES
from molora.config.gate import GateSettings
from molora.experts.kernel import scores as exact_scores
from molora.gates.gate import Gate, GatePlace, affine
from molora.gates.rows import GateRows
from molora.gates.starts import started

_SHORT = 1e-6  # lengths of x and row, multiplied, below which a cosine is 0

ScoreFactory = Callable[[int, int], nn.Module]


class _RowsGate(Gate):
    """A gate with a row per expert, small and random at first: a zero router never breaks ties."""

    rows: GateRows

    def make(self, place: GatePlace) -> None:
        self.make_rows(place, place.d_in)

    def make_rows(self, place: GatePlace, width: int) -> None:
        """Rows (expert, width), and biases: zeros, or as a torch Linear has them."""
        settings, experts = self.settings, place.num_experts
        self.rows = place.rows(started(settings, experts, width))
        if settings.bias:
            linear = settings.init_std == "linear"
            self.bias = place.rows(
                started(settings, experts, width=width) if linear else torch.zeros(experts)
            )


class LinearGate(_RowsGate):
    """`w_e · x`."""

    from_products = True

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        return self.rows.logits(x) if products is None else products


class MlpGate(_RowsGate):
    """`w_e · relu(W x + b)`."""

    hidden: nn.Linear

    def make(self, place: GatePlace) -> None:
        hidden = nn.Linear(place.d_in, self.settings.hidden)
        self.make_rows(place, self.settings.hidden)
        self.hidden = hidden  # after the rows: the order of an optimiser's state

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        return self.rows.logits(affine(x, self.hidden).relu())


class CosineGate(_RowsGate):
    """The cosine of w_e and x; under `norm: layer` both are standardised first: `w_e · x / √d`."""

    def make(self, place: GatePlace) -> None:
        self.from_products = self.settings.norm == "unit"
        super().make(place)

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        if not self.from_products:
            d_in = x.shape[-1]
            blocks = [_standard(block, d_in) for block in self.rows.blocks]
            return self.rows.in_order(exact_scores(_standard(x, d_in), blocks)) / math.sqrt(d_in)
        products = self.rows.logits(x) if products is None else products
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=products.dtype)
        rows = torch.linalg.vector_norm(self.rows.weight, dim=-1, dtype=products.dtype)
        product = lengths * rows
        # A vector without length has no direction, and no gradient: 1 / length would be one without bound.
        return (products / product.clamp_min(_SHORT)).masked_fill(product < _SHORT, 0.0)


class ConstantGate(Gate):
    """A number per expert (one per split), whatever x is."""

    rows: GateRows

    def make(self, place: GatePlace) -> None:
        settings, experts = self.settings, place.num_experts
        shape = (experts, settings.splits) if settings.splits > 1 else (experts,)
        spread = started(settings, *shape) if place.spread else torch.zeros(shape)
        self.rows = place.rows(settings.start + spread)

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        return self.rows.table()


class _TaskGate(Gate):
    """A gate with a row per task id, which reads each task's share (samples, task)."""

    tasks: GateRows

    def make_tasks(self, place: GatePlace, weight: Tensor) -> GateRows:
        """Rows of the tasks, (task, width)."""
        assert place.tasks is not None
        return GateRows(weight, *place.tasks)

    def task_rows(self, shares: Tensor) -> Tensor:
        """The mean row of each sample's tasks, (samples, width)."""
        weight = self.tasks.weight
        return exact_scores(shares.to(weight.dtype), [weight.t()])


class TaskTableGate(_TaskGate):
    """A number per task and expert (and split)."""

    def make(self, place: GatePlace) -> None:
        columns = place.num_experts * self.settings.splits
        self.tasks = self.make_tasks(place, started(self.settings, place.num_tasks, columns))

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        return self.task_rows(x)


class EmbeddingGate(_TaskGate, _RowsGate):
    """`w_e · v`, v the vector of the task."""

    def make(self, place: GatePlace) -> None:
        width = self.settings.embedding_dim
        tasks = self.make_tasks(place, torch.randn(place.num_tasks, width))
        self.make_rows(place, width)
        self.tasks = tasks  # after the rows: the order of an optimiser's state

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        return self.rows.logits(self.task_rows(x))


class CustomGate(Gate):
    """A score that a user registered; `factory` makes it."""

    custom: nn.Module

    def __init__(self, factory: ScoreFactory, settings: GateSettings, place: GatePlace) -> None:
        custom = factory(place.d_in, place.num_experts)
        super().__init__(settings, place)
        self.custom = custom

    def make(self, place: GatePlace) -> None:
        torch.randn(place.num_experts, place.d_in)  # of no use, but a seed gives what it always gave

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.custom(x if x.dtype == torch.float64 else x.float())
        return logits


def table_gate(settings: GateSettings, place: GatePlace) -> Gate:
    """Numbers by task, or the same for all."""
    return TaskTableGate(settings, place) if settings.scope == "task" else ConstantGate(settings, place)


def register_score(name: str, factory: ScoreFactory) -> None:
    """Make `GateConfig(score=name)` mean a score of your own, in Python and in recipes.

    Args:
        factory: (d_in, num_experts) -> a module that maps what the gate reads, (tokens, d_in), to logits (tokens,
            expert), both float32 or better; row by row, or batches would depend on who is in them. Its parameters
            are saved with the adapter. Register it under the same name before loading that.

    Raises:
        ConfigError: the name is taken, or is no name.
    """
    SCORES.add(name, partial(CustomGate, factory), getattr(factory, "__module__", "molora"))


def _standard(values: Tensor, d_in: int) -> Tensor:
    """Rows with mean 0 and variance 1, in float32 or better."""
    with torch.autocast(values.device.type, enabled=False):
        return F.layer_norm(values.to(torch.promote_types(values.dtype, torch.float32)), (d_in,))

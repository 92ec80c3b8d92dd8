"""Strategy: what a way of learning tasks one after another does before, during and after each of them.

The base class does nothing. That is `sequential` where one expert serves all tasks, and `inc_lora` and `independent`
where each task has its own; these two differ only in their gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from molora.config.continual import StrategyConfig
from molora.data.clusters import inference
from molora.data.tasks import Task
from molora.experts.bank import ExpertBank
from molora.gates.gate import Gate
from molora.tuner.layer import MoLoraLayer

Batches = Callable[[], Iterator[dict[str, Tensor]]]


@dataclass(frozen=True)
class Turn:
    """One task's turn, or one of several tasks together: the last `count` up to `index`.

    `batches()` is a pass over the training data of `task` as the model's inputs, on its device. Those of generative models
    have the targets in `labels`, those of classifiers have no labels.
    """

    index: int
    tasks: Sequence[Task]  # of the whole sequence, in order
    batches: Batches = field(repr=False, default=lambda: iter(()))
    seed: int = 0
    count: int = 1

    @property
    def task(self) -> Task:
        return self.tasks[self.index]

    @property
    def own(self) -> Sequence[Task]:
        """The tasks of this turn."""
        return self.tasks[self.index + 1 - self.count : self.index + 1]

    @property
    def seen(self) -> Sequence[Task]:
        """The tasks up to this one."""
        return self.tasks[: self.index + 1]

    def competing(self, softmax: str) -> list[int]:
        """The classes in a classifier's loss: those of the turn (own), of the tasks so far (seen), or of all."""
        used = {"own": self.own, "seen": self.seen, "all": self.tasks}[softmax]
        return [c for task in used for c in task.classes]


class Strategy:
    """The interface; every hook may be left out.

    A strategy sees the model only in its hooks, and is stored apart from it: `tensors` and `plain` are all it knows
    after a task, `restore` brings that back.
    """

    softmax = "own"  # whose labels compete while a classifier trains: the task's own, all seen so far, or all
    changes_weights = False  # whether after_task changes the adapter

    def __init__(self, settings: StrategyConfig) -> None:
        self.settings = settings

    @property
    def one_expert(self) -> bool:
        """Whether all tasks train the same experts; else each task adds one, and the others are frozen."""
        return self.settings.spec.one_expert

    def number(self, name: str) -> float:
        """A setting that this strategy has."""
        value = getattr(self.settings, name)
        assert value is not None, f"{self.settings.kind} has no {name}"
        return float(value)

    def training_tasks(self, turn: Turn) -> Sequence[Task]:
        """What is trained on in this turn."""
        return turn.own

    def before_task(self, model: nn.Module, turn: Turn) -> None:
        """Called with the task's expert in place, before the optimiser is built."""

    def loss(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Weighted terms to add to the training loss, by name."""
        return {}

    def at_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Called before every batch: `step` optimiser steps, of so many, are done."""

    def after_step(self, model: nn.Module) -> None:
        """Called after every optimiser step."""

    def as_it_was(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, what this changes of the model while it trains is as it was before the task, but for the new expert."""
        return nullcontext()

    def after_task(self, model: nn.Module, turn: Turn) -> None:
        """Called with the trained model, before it is scored."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be remembered of the tasks so far, as tensors."""
        return {}

    def plain(self) -> dict[str, Any]:
        """The same, as JSON types."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Undo `tensors` and `plain`."""


class KeepsBases(Strategy):
    """A strategy that remembers, by layer or gate, an orthonormal basis (d, k) of what earlier tasks read."""

    def __init__(self, settings: StrategyConfig) -> None:
        super().__init__(settings)
        self.bases: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        return {f"basis/{key}": basis.contiguous() for key, basis in self.bases.items()}

    def share(self, turn: Turn) -> float:
        """How much of the energy of a turn's inputs the bases hold after it: from `energy` evenly up to `energy_end`."""
        start, end = self.number("energy"), self.settings.energy_end
        return start if end is None else start + (end - start) * turn.index / max(1, len(turn.tasks))

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self.bases = {key.removeprefix("basis/"): value for key, value in tensors.items()}


def hold_sum(model: nn.Module) -> None:
    """Keep a gate that adds experts up at 1, as published: its numbers are Parameters, but not to be learned."""
    for gate in (m for m in model.modules() if isinstance(m, Gate)):
        settings = gate.settings
        if (settings.scope, settings.transform, settings.start) == ("constant", "identity", 1.0):
            assert gate.rows is not None
            gate.rows.hold()


Note = Callable[[nn.Module, tuple[Any, ...]], None]


def watch(model: nn.Module, batches: Batches, notes: Iterable[tuple[Any, Note]]) -> None:
    """One pass without gradients, in which each module's note is called with the module and its inputs."""
    hooks = [module.register_forward_pre_hook(note) for module, note in notes]
    try:
        with inference(model):
            for batch in batches():
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()


def expert_layers(model: nn.Module) -> Iterator[tuple[str, MoLoraLayer, ExpertBank]]:
    """Name, layer and bank of every adapted linear with experts, under the one active adapter."""
    for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
        for adapter in layer.active_adapters:
            mount = layer.mounts.get(adapter)
            if mount is not None and not mount.plain:
                yield mount.key, layer, mount.bank

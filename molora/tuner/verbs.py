"""The verbs on experts that a model with a mixture has, beside what PEFT gives every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from molora.calls.context import RoutingContext
from molora.errors import ConfigError
from molora.tuner import grow
from molora.tuner.adapter_name import only_one
from molora.tuner.config import MoLoraConfig
from molora.tuner.merge_experts import merge_experts


class ExpertVerbs:
    """Experts of an adapter: what they are called, and adding, removing and freezing them."""

    model: Any  # the base, as PEFT declares it
    context: RoutingContext
    peft_config: dict[str, Any]

    if TYPE_CHECKING:  # PEFT's tuner has it

        @property
        def active_adapters(self) -> list[str]: ...

    @property
    def expert_names(self) -> list[str]:
        """Experts of the active adapter, in order."""
        return list(self._config().expert_names or [])

    @property
    def trainable_experts(self) -> list[str]:
        """Experts that are not frozen."""
        return [name for name in self.expert_names if name not in self._config().frozen_experts]

    @property
    def task_ids(self) -> dict[str, int]:
        """Task name -> stable id."""
        return dict(self._config().task_ids or {})

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Task name -> {expert: weight}."""
        return self._config().task_map().weights

    def add_expert(
        self,
        name: str,
        *,
        tasks: Sequence[str] = (),
        init: str = "new",
        freeze_others: bool = True,
        isolate: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Give every bank one more expert; see `grow.add_expert`."""
        where = self._place(adapter_name)
        grow.add_expert(*where, name, tasks=tasks, init=init, freeze_others=freeze_others, isolate=isolate)

    def weigh_tasks(
        self, tasks: Mapping[str, Mapping[str, float]], *, adapter_name: str | None = None
    ) -> None:
        """Give tasks these experts with these positive weights: {task: {expert: weight}}. Under a task gate they decide."""
        grow.weigh_tasks(*self._place(adapter_name), tasks)

    def remove_expert(self, name: str, *, drop_tasks: bool = False, adapter_name: str | None = None) -> None:
        """Shrink every bank by one expert; refuses the last one, and a task's only one unless drop_tasks.

        With drop_tasks, the tasks it was added for are forgotten too.
        """
        grow.remove_expert(*self._place(adapter_name), name, drop_tasks=drop_tasks)

    def merge_experts(
        self,
        names: Sequence[str],
        into: str,
        *,
        weights: Mapping[str, float] | None = None,
        rank: int | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Replace experts of a task gate by one, their weighted mean; see `tuner.merge_experts`."""
        merge_experts(*self._place(adapter_name), names, into, weights=weights, rank=rank)

    def freeze_experts(self, names: str | Sequence[str], *, adapter_name: str | None = None) -> None:
        """Freeze experts and their gate rows. Replaces Parameters: build the optimiser afterwards."""
        grow.set_frozen(*self._place(adapter_name), names, frozen=True)

    def unfreeze_experts(self, names: str | Sequence[str], *, adapter_name: str | None = None) -> None:
        """The reverse of `freeze_experts`; after the last one plain LoRAs, heads and gates' common parts learn too."""
        grow.set_frozen(*self._place(adapter_name), names, frozen=False)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's LoRA makes a new adapter of several with it; a mixture weighs its experts instead."""
        raise ConfigError(
            "add_weighted_adapter is for PEFT's LoRA: a mixture weighs experts inside one adapter.",
            hint="make a mixture of LoRA folders with molora.compose, or merge fixed weights with "
            "merge_and_unload(expert_weights={...}).",
        )

    def _place(self, adapter_name: str | None) -> tuple[nn.Module, RoutingContext, str]:
        return self.model, self.context, self._adapter(adapter_name)

    def _adapter(self, adapter_name: str | None = None) -> str:
        if adapter_name is None:
            return only_one(self.active_adapters)
        if adapter_name not in self.peft_config:
            raise ConfigError(f"no adapter {adapter_name!r}; adapters: {', '.join(self.peft_config)}.")
        return adapter_name

    def _config(self) -> MoLoraConfig:
        return self.peft_config[self._adapter()]

"""Where experts matter: a short training of a recipe, of which only numbers are kept, and what follows for its layers.

`drop` measures how much of what all experts add comes from each layer, E‖Δ_l(x)‖² over tokens, as gates weigh them, and keeps
the fewest layers that make up a share of it (LoRA-drop; there the other layers share one LoRA, here they get none).
`sensitivity` measures Σ |w ∂w| over a layer's experts, AdaLoRA's importance of numbers, and deals out the present number of
parameters again, rank by rank to the layer with the largest Σ |w ∂w| / (rank + 1), which is d'Hondt's rule.

References: LoRA-drop, arXiv:2402.07721; AdaLoRA, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molora.config import RunConfig
from molora.config.objective import OBJECTIVES
from molora.errors import ConfigError
from molora.forward.mount import Mount, MountPoint
from molora.models.build import build_model, labels_of_tasks, tasks_of
from molora.training.environment import at_work, prepare_process
from molora.training.optimise import check_device, optimise
from molora.training.train import encoded, with_labels

METHODS = ("drop", "sensitivity")
BATCHES = 16  # over which layers are measured, after the probe's training


class LayerShare(NamedTuple):
    """One layer of the probe."""

    key: str  # of the linear
    value: float  # what the method measures
    rank: int  # that its experts have, the largest
    numbers: int  # that learn there, experts alone


def probe(config: RunConfig, method: str, steps: int) -> list[LayerShare]:
    """Train the recipe's mixture for so many steps, in memory, and measure its layers.

    Raises:
        ConfigError: the recipe's layers cannot be measured one by one; nothing was loaded.
    """
    _check(config, method)
    check_device(config.train)
    tasks = tasks_of(config)
    config = with_labels(config, tasks)
    prepare_process(config.seed)
    with at_work():
        model, tokenizer = build_model(config, tasks.ids, labels_of_tasks(config.base, tasks))
        data = encoded(config, tasks, tokenizer)
        changes: dict[str, Any] = {
            "max_steps": steps, "epochs": None, "stages": [], "val_every": None, "patience": None, "rank_growth": None,
        }  # fmt: skip
        trainer = optimise(model, data, config.train.model_copy(update=changes))
        model = model.to(trainer.strategy.root_device).eval()
        objective = OBJECTIVES[config.train.objective.kind](None, config.train.objective)
        batches = [
            trainer.strategy.batch_to_device(b) for b in islice(iter(data.train_dataloader()), BATCHES)
        ]
        with trainer.precision_plugin.forward_context():
            measure = added if method == "drop" else sensitivity
            values = measure(model, objective, batches)
    return [_share(mount, values[mount.key]) for mount in mounts_of(model)]


def _check(config: RunConfig, method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"--method {method} is not one of {', '.join(METHODS)}.")
    for section in ("continual", "federated", "stages"):
        if getattr(config, section) is not None:
            raise ConfigError(
                f"layers are measured in one training; take out the recipe's `{section}` section."
            )
    for key in ("ffn_targets", "from_loras"):
        if getattr(config.adapter, key):
            why = "mixes whole feed-forwards" if key == "ffn_targets" else "has experts of ranks of their own"
            raise ConfigError(
                f"adapter.{key} {why}, and layers are measured one by one; use target_modules and new experts."
            )
    if method == "sensitivity" and not isinstance(config.adapter.r, int):
        raise ConfigError("--method sensitivity deals out ranks anew; give adapter.r as one number.")


def mounts_of(model: torch.nn.Module) -> list[Mount]:
    """The mounts of experts of the active adapter."""
    points = [m for m in model.modules() if isinstance(m, MountPoint)]
    found = [p.mounts[p.active_adapters[0]] for p in points if p.active_adapters[0] in p.mounts]
    return [mount for mount in found if not mount.plain]


def _share(mount: Mount, value: float) -> LayerShare:
    numbers = sum(p.numel() for p in mount.bank.parameters() if p.requires_grad)
    return LayerShare(mount.key, value, max(mount.bank.ranks), numbers)


@torch.no_grad()
def added(model: Any, objective: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """By layer, the mean over tokens of the squared norm of what its experts add to the base's output."""
    totals: dict[str, list[float]] = {}
    masks: list[Tensor | None] = [None]

    def look(point: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        squares = (output - point.base_layer(arguments[0])).float().square().sum(dim=-1)
        mask = masks[0]
        if mask is not None and mask.shape == squares.shape:
            squares = squares[mask.bool()]
        entry = totals.setdefault(point.mounts[point.active_adapters[0]].key, [0.0, 0.0])
        entry[0] += squares.sum().item()
        entry[1] += squares.numel()

    keys = {mount.key for mount in mounts_of(model)}
    points: list[Any] = [m for m in model.modules() if isinstance(m, MountPoint)]
    hooks = [p.register_forward_hook(look) for p in points if p.mounts[p.active_adapters[0]].key in keys]
    try:
        for batch in batches:
            masks[0] = batch.get("attention_mask")
            objective.held_out(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: totals[key][0] / max(1.0, totals[key][1]) if key in totals else 0.0 for key in keys}


def sensitivity(model: Any, objective: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """By layer, the mean over batches of Σ |w ∂w| over its experts' learning parameters."""
    totals = {mount.key: 0.0 for mount in mounts_of(model)}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        objective.task_loss(model, batch)[0].backward()
        for mount in mounts_of(model):
            totals[mount.key] += sum(
                float((p.detach() * p.grad).abs().sum())
                for p in mount.bank.parameters()
                if p.grad is not None
            )
    model.zero_grad(set_to_none=True)
    return {key: total / len(batches) for key, total in totals.items()}


def kept(layers: Sequence[LayerShare], share: float) -> list[str]:
    """The fewest layers that make up this share of the sum, in their order in the model.

    Raises:
        ConfigError: no layer adds anything.
    """
    total, sum_so_far, chosen = sum(layer.value for layer in layers), 0.0, set()
    if not total > 0:
        raise ConfigError(
            "no layer adds anything after the probe.", hint="more --steps, or a higher train.lr."
        )
    for layer in sorted(layers, key=lambda one: -one.value):
        if sum_so_far >= share * total * (1 - 1e-12):
            break
        sum_so_far += layer.value
        chosen.add(layer.key)
    return [layer.key for layer in layers if layer.key in chosen]


def dealt(layers: Sequence[LayerShare], most: int) -> dict[str, int]:
    """A rank of 1 to `most` for each layer, within the number of parameters that the layers have now."""
    if not sum(layer.value for layer in layers) > 0:
        raise ConfigError(
            "no layer has a gradient after the probe.", hint="more --steps, or a higher train.lr."
        )
    costs = {layer.key: layer.numbers / layer.rank for layer in layers}
    ranks = dict.fromkeys(costs, 1)
    left = sum(layer.numbers for layer in layers) - sum(costs.values())
    while True:
        open_ = [layer for layer in layers if ranks[layer.key] < most and costs[layer.key] <= left + 1e-6]
        if not open_:
            return ranks
        best = max(open_, key=lambda one: one.value / (ranks[one.key] + 1))
        ranks[best.key] += 1
        left -= costs[best.key]

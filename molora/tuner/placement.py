"""What differs from layer to layer: how many experts there are, which, and how many a token uses."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config.mixture import SavedMixture
from molora.config.roster import Roster
from molora.errors import ConfigError
from molora.forward.mount import Mount
from molora.tuner.config import MoLoraConfig
from molora.tuner.targets import block_index, hidden_size, pattern_value


def by_layer(value: Any, key: str, what: str, default: Any = None) -> Any:
    """The value of a setting at the layer named `key`: a number, a list by block, or `{pattern: number}`."""
    if isinstance(value, dict):
        return pattern_value(value, key, default)
    if not isinstance(value, list):
        return value
    index = block_index(key)
    if index is None or index >= len(value):
        raise ConfigError(
            f"{what} is a list of {len(value)} numbers, one per block, but {key!r} lies in block {index}.",
            hint=f"give one number for every block, or {what}={{pattern: number}}.",
        )
    return value[index]


def fit_to_base(config: MoLoraConfig, model: nn.Module) -> None:
    """Fill in what follows from the base: its revision, its blocks, the width of two-pass features, and lists by block.

    A list with fewer entries than there are blocks covers several blocks with each, where that works out:
    `[2, 4, 6, 8]` gives a model of 32 blocks 2 experts in its first 8, and so on.
    """
    linears = (name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
    blocks = config.depth = 1 + max((i for i in map(block_index, linears) if i is not None), default=-1)

    if config.revision is None:
        config.revision = getattr(model, "base_revision", None)  # as `load_base` leaves it
    _check_blocks(config.layers_to_transform, blocks)

    def stretched(value: Any, what: str) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) > blocks:
            raise ConfigError(
                f"{what} is a list of {len(value)} numbers, one per block, but the model has {blocks} blocks.",
                hint=f"give at most {blocks} numbers; fewer that divide {blocks} cover several blocks each.",
            )
        return value if blocks % len(value) else [n for n in value for _ in range(blocks // len(value))]

    gate = config.gate
    config.experts_by_layer = stretched(config.experts_by_layer, "num_experts")
    config.r, gate.top_k = stretched(config.r, "r"), stretched(gate.top_k, "gate.top_k")
    if gate.scope == "two_pass" and gate.feature_dim is None:
        gate.feature_dim = hidden_size(model, "gate.scope='two_pass'")


def _check_blocks(chosen: int | list[int] | None, blocks: int) -> None:
    """Raise ConfigError for indices of blocks that the base does not have."""
    indices = [chosen] if isinstance(chosen, int) else chosen or []
    if unknown := [i for i in indices if not 0 <= i < blocks]:
        raise ConfigError(
            f"layers_to_transform names block {', '.join(map(str, unknown))}, but the model has blocks 0 to {blocks - 1}."
        )


def experts_at(config: SavedMixture, key: str) -> list[str]:
    """Names of the experts in a layer, in order: the first so many of those the adapter was made with, all added later."""
    names = list(config.expert_names or [])
    if config.experts_by_layer is None:
        return names
    first = config.first_experts or []
    kept = set(first[: by_layer(config.experts_by_layer, key, "num_experts", len(first))])
    return [name for name in names if name in kept or name not in first]


def top_k_at(config: SavedMixture, key: str) -> int:
    """Experts per token in a layer, at most as many as it has."""
    smallest = 2  # the default of GateConfig, for layers that no pattern names
    return min(by_layer(config.gate.top_k, key, "gate.top_k", smallest), len(experts_at(config, key)))


def blend_at(config: SavedMixture, key: str) -> float:
    """Where the blend of a layer's gate starts: its logit rises from block to block; 0 outside of blocks."""
    index, last = block_index(key), config.depth - 1
    if index is None or last < 1:
        return 0.0
    return config.gate.blend_spread * float(2 * index / last - 1)


def frozen_at(config: SavedMixture, key: str) -> list[bool]:
    """Per expert of a layer, whether it is frozen."""
    return [name in config.frozen_experts for name in experts_at(config, key)]


def frozen_rows_at(config: SavedMixture, key: str) -> list[bool]:
    """Per expert of a layer, whether its gate row is frozen: with the expert, unless the config frees it."""
    names = experts_at(config, key)
    return [name in config.frozen_experts and name not in config.free_rows for name in names]


def shared_frozen_at(config: SavedMixture, key: str) -> bool:
    """Whether what serves all rows of a layer's gate is frozen: with the adapter's extras, or with all the rows."""
    return config.frozen_extras or all(frozen_rows_at(config, key))


def blocks_at(config: SavedMixture, key: str) -> list[list[int]]:
    """The gate's blocks as indices of a layer's experts."""
    names = experts_at(config, key)
    blocks = [[names.index(n) for n in block if n in names] for block in config.gate_blocks or []]
    return [block for block in blocks if block]


def task_blocks(config: SavedMixture) -> tuple[list[list[int]], list[bool]]:
    """Rows of a learned task gate, one per task id: frozen and trainable ones, and which are frozen.

    A task learns as long as one of its experts does.
    """
    roster = Roster.of(config)
    count = max(roster.next_task_id, 1)
    frozen = [True] * count
    for task, row in roster.tasks.items():
        frozen[row.id] = roster.task_frozen(task)
    parts = [[i for i in range(count) if frozen[i] == state] for state in (True, False)]
    return [part for part in parts if part], frozen


def place(mount: Mount, config: SavedMixture) -> None:
    """Note at a mount, and its gate, what its adapter has by now: experts, how many a token uses, what is frozen."""
    if not mount.plain:
        names = experts_at(config, mount.key)
        mount.names = None if len(names) == config.num_experts else tuple(names)
        mount.frozen_rows = tuple(frozen_rows_at(config, mount.key))
    mount.refresh()
    if mount.gate is not None:
        mount.gate.top_k = top_k_at(config, mount.key)
        mount.gate.freeze_shared(shared_frozen_at(config, mount.key))

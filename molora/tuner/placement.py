"""What differs from layer to layer: how many experts there are, which, and how many a token uses."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.errors import ConfigError
from molora.tuner.config import MoLoraConfig
from molora.tuner.targets import block_index, pattern_value


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


def stretch_lists(config: MoLoraConfig, model: nn.Module) -> None:
    """Lists by block that name fewer entries than the model has blocks cover as many blocks each, where that works out.

    So `[2, 4, 6, 8]` gives a model of 32 blocks 2 experts in its first 8, and so on.
    """
    linears = (name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
    blocks = 1 + max((i for i in map(block_index, linears) if i is not None), default=-1)

    def stretched(value: Any) -> Any:
        if not isinstance(value, list) or len(value) >= blocks or blocks % len(value):
            return value
        return [entry for entry in value for _ in range(blocks // len(value))]

    for what, value in (
        ("num_experts", config.experts_by_layer),
        ("r", config.r),
        ("gate.top_k", config.gate.top_k),
    ):
        if isinstance(value, list) and len(value) > blocks:
            raise ConfigError(
                f"{what} is a list of {len(value)} numbers, one per block, but the model has {blocks} blocks.",
                hint=f"give at most {blocks} numbers; fewer that divide {blocks} cover several blocks each.",
            )
    config.depth = blocks
    config.experts_by_layer = stretched(config.experts_by_layer)
    config.r, config.gate.top_k = stretched(config.r), stretched(config.gate.top_k)


def experts_at(config: MoLoraConfig, key: str) -> list[str]:
    """Names of the experts that exist in a layer, in expert order.

    Of the experts an adapter was made with, a layer has the first so many; those added later are everywhere.
    """
    names = list(config.expert_names or [])
    if config.experts_by_layer is None:
        return names
    first = config.first_experts or []
    kept = set(first[: by_layer(config.experts_by_layer, key, "num_experts", len(first))])
    return [name for name in names if name in kept or name not in first]


def names_at(config: MoLoraConfig, key: str) -> tuple[str, ...] | None:
    """`experts_at` where that is not all of them, else None."""
    names = experts_at(config, key)
    return None if len(names) == config.num_experts else tuple(names)


def top_k_at(config: MoLoraConfig, key: str) -> int:
    """Experts per token in a layer, at most as many as it has."""
    smallest = 2  # the default of GateConfig, for layers that no pattern names
    return min(by_layer(config.gate.top_k, key, "gate.top_k", smallest), len(experts_at(config, key)))


def blend_at(config: MoLoraConfig, key: str) -> float:
    """Where the blend of a layer's gate starts: its logit rises from block to block; 0 outside of blocks."""
    index, last = block_index(key), config.depth - 1
    if index is None or last < 1:
        return 0.0
    return config.gate.blend_spread * float(2 * index / last - 1)


def frozen_at(config: MoLoraConfig, key: str) -> list[bool]:
    """Per expert of a layer, whether it is frozen."""
    return [name in config.frozen_experts for name in experts_at(config, key)]


def frozen_rows_at(config: MoLoraConfig, key: str) -> list[bool]:
    """Per expert of a layer, whether its gate row is frozen: with the expert, unless the config frees it."""
    names = experts_at(config, key)
    return [name in config.frozen_experts and name not in config.free_rows for name in names]


def shared_frozen_at(config: MoLoraConfig, key: str) -> bool:
    """Whether what serves all rows of a layer's gate is frozen: with the adapter's extras, or with all the rows."""
    return config.frozen_extras or all(frozen_rows_at(config, key))


def blocks_at(config: MoLoraConfig, key: str) -> list[list[int]]:
    """The gate's blocks as indices of a layer's experts."""
    names = experts_at(config, key)
    blocks = [[names.index(n) for n in block if n in names] for block in config.gate_blocks or []]
    return [block for block in blocks if block]


def task_blocks(config: MoLoraConfig) -> tuple[list[list[int]], list[bool]]:
    """Rows of a learned task gate, one per task id: frozen and trainable ones, and which are frozen.

    A task learns as long as one of its experts does.
    """
    roster = config.roster
    count = max(roster.next_task_id, 1)
    frozen = [True] * count
    for task, row in roster.tasks.items():
        frozen[row.id] = roster.task_frozen(task)
    parts = [[i for i in range(count) if frozen[i] == state] for state in (True, False)]
    return [part for part in parts if part], frozen

"""Ranks that change while experts learn: what an expert adds stays what it was, and so do its old rows, bit for bit.

A row of A and a column of B make one rank of an expert. A new one starts as a new expert does, A drawn and B zero, and the
scaling stays: with α / r it would fall as r grows, and all that was learnt with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molora.config.choices import KINDS
from molora.config.mixture import ExpertSpec
from molora.errors import ConfigError
from molora.experts.bank import ExpertBank, ExpertRows
from molora.experts.init import init_A
from molora.forward.mount import Mount, MountPoint
from molora.tuner.api import find_context
from molora.tuner.config import MoLoraConfig
from molora.tuner.loan import own
from molora.tuner.parts import rank_of, scaling_of
from molora.tuner.placement import experts_at, frozen_at, place


class Moved(NamedTuple):
    """A Parameter that another one, of another rank, has taken the place of."""

    old: nn.Parameter
    new: nn.Parameter


def ranks_of(model: nn.Module) -> dict[str, int]:
    """By name, the rank of each expert of the active adapter that learns.

    Raises:
        ConfigError: their ranks cannot change.
    """
    config, mounts = _found(model)
    if not KINDS[config.kind].grows or config.share_A:
        what = "experts that share one A" if config.share_A else f"experts of kind {config.kind}"
        allowed = ", ".join(name for name in KINDS if KINDS[name].grows)
        raise ConfigError(
            f"the ranks of {what} cannot grow in training.", hint=f"use share_A: false and one of: {allowed}."
        )
    found: dict[str, int] = {}
    for name in (n for n in config.expert_names or () if n not in config.frozen_experts):
        here = [mount.key for mount in mounts if name in experts_at(config, mount.key)]
        shapes = {(rank_of(config, name, key), scaling_of(config, name, key)) for key in here}
        if len(shapes) > 1:
            raise ConfigError(
                f"the expert {name!r} has several ranks or scalings, by layer; it grows from one only.",
                hint="give r, lora_alpha and scaling as numbers, without patterns.",
            )
        if shapes:
            found[name] = shapes.pop()[0]
    return found


@torch.no_grad()
def set_ranks(model: nn.Module, ranks: Mapping[str, int]) -> list[Moved]:
    """Give experts of the active adapter other ranks.

    A larger one changes nothing that the model computes; a smaller one cuts the last rows off.

    Args:
        ranks: by expert; those left out stay as they are.

    Returns the Parameters that were replaced, for `carry_over`.

    Raises:
        ConfigError: as `ranks_of`.
    """
    before = ranks_of(model)
    _, mounts = _found(model)
    point = next(m for m in model.modules() if isinstance(m, MountPoint))
    config = own(model, point.context, point.active_adapters[0])
    changed = {name: rank for name, rank in ranks.items() if rank != before[name]}
    moved: list[Moved] = []
    for mount in mounts:
        here = experts_at(config, mount.key)
        if not any(name in changed for name in here):
            continue
        bank = mount.bank
        rows = [
            _resized(config, bank, row, changed[name]) if name in changed else row
            for name, row in zip(here, bank.rows(), strict=True)
        ]
        old = {name: stack.trainable for name, stack in bank.named_stacks().items()}
        bank.assign(rows, frozen_at(config, mount.key))
        for name, stack in bank.named_stacks().items():
            if (before_it := old[name]) is not None and stack.trainable is not None:
                moved.append(Moved(before_it, stack.trainable))
    for name, rank in changed.items():
        scaling = next(scaling_of(config, name, m.key) for m in mounts if name in experts_at(config, m.key))
        config.expert_specs[name] = ExpertSpec(r=rank, lora_alpha=config.lora_alpha, scaling=scaling)
    for mount in mounts:
        place(mount, config)
    return moved


def carry_over(optimizer: torch.optim.Optimizer, moved: list[Moved]) -> None:
    """Let an optimiser go on with Parameters of other ranks: what it remembers of the old rows stays, of new ones it is zero.

    Adam corrects its running means for the steps since its start, so a new row's first steps are up to
    (1 - β1) / √(1 - β2) = 3 times as long as those of an optimiser that starts with it.
    """
    new = {one.old: one.new for one in moved}
    for group in optimizer.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]
    for one in moved:
        if one.old in optimizer.state:
            state = optimizer.state.pop(one.old)
            optimizer.state[one.new] = {
                key: _fitted(value, one) if torch.is_tensor(value) and value.shape == one.old.shape else value
                for key, value in state.items()
            }


def _fitted(value: Tensor, moved: Moved) -> Tensor:
    fitted = value.new_zeros(moved.new.shape)
    common = tuple(slice(min(pair)) for pair in zip(value.shape, fitted.shape, strict=True))
    fitted[common] = value[common]
    return fitted


def _resized(config: MoLoraConfig, bank: ExpertBank, row: ExpertRows, rank: int) -> ExpertRows:
    A, B = row.rows["A"], row.rows["B"]
    fresh = bank.kind.new(
        A.shape[1], B.shape[1], rank, lambda it: init_A(it, config.init, config.init_std, config.init_gain)
    )
    rows = {}
    for name, spec in bank.kind.stacks.items():
        old = row.rows[name]
        if spec.axes.startswith("rank"):
            old = torch.cat([old[:rank], fresh[name][len(old) :].to(old)])
        rows[name] = old
    return ExpertRows(rows, rank, row.scaling)


def _found(model: nn.Module) -> tuple[MoLoraConfig, list[Mount]]:
    """The active adapter's config, and its mounts of experts."""
    find_context(model)  # says so where there is none
    points = [m for m in model.modules() if isinstance(m, MountPoint)]
    adapter = points[0].active_adapters[0]
    mounts = [point.mounts[adapter] for point in points if adapter in point.mounts]
    config = mounts[0].config
    assert isinstance(config, MoLoraConfig)
    return config, [mount for mount in mounts if not mount.plain]

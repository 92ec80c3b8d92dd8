"""From config to parts: an expert's rank, scaling and factors, a gate's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config.choices import CORES, KINDS, SCORES
from molora.config.mixture import SavedMixture
from molora.errors import ConfigError
from molora.experts.bank import Expert, ExpertBank, ExpertRows
from molora.experts.cores import TaskCores
from molora.experts.init import expected_std, init_A, svd_segments
from molora.experts.kinds.kind import Kind, Place
from molora.experts.kinds.lora import Lora
from molora.forward.mount import MountPoint
from molora.gates.gate import Gate, GatePlace
from molora.tuner import placement
from molora.tuner.base_weight import BaseWeight
from molora.tuner.placement import by_layer, experts_at, frozen_at, task_blocks
from molora.tuner.targets import pattern_value


def rank_of(config: SavedMixture, expert: str, key: str) -> int:
    """The rank of one expert in the layer named `key`."""
    spec = config.expert_specs.get(expert)
    if spec is not None:
        return int(pattern_value(spec.rank_pattern, key, spec.r))
    if isinstance(config.r, list):
        return int(by_layer(config.r, key, "r"))
    return int(pattern_value(config.rank_pattern, key, config.r))


def scaling_of(config: SavedMixture, expert: str, key: str) -> float:
    """The scaling of one expert in the layer named `key`."""
    spec = config.expert_specs.get(expert, config)
    if isinstance(spec.scaling, (int, float)):
        return float(spec.scaling)
    alpha, r = float(pattern_value(spec.alpha_pattern, key, spec.lora_alpha)), rank_of(config, expert, key)
    if spec.scaling == "alpha":
        return alpha
    return alpha / math.sqrt(r) if spec.use_rslora or spec.scaling == "alpha_over_sqrt_r" else alpha / r


def kind_of(config: SavedMixture) -> Kind:
    """The kind of a config's experts, with its settings."""
    return KINDS[config.kind](share_A=config.share_A, **config.kind_settings)


def new_expert(
    config: SavedMixture,
    kind: Kind,
    name: str,
    key: str,
    d_in: int,
    d_out: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> ExpertRows:
    """A fresh expert for one layer, whose update is zero."""
    r = rank_of(config, name, key)
    rows = kind.new(d_in, d_out, r, lambda A: init_A(A, config.init, config.init_std, config.init_gain))
    rows = {name: row.to(device=device, dtype=dtype) for name, row in rows.items()}
    return ExpertRows(rows, r, scaling_of(config, name, key))


def new_experts(
    config: SavedMixture, kind: Kind, names: Sequence[str], key: str, base: nn.Module
) -> list[ExpertRows]:
    """Fresh experts for one layer, from its base layer's weight where `init` asks for that.

    Raises:
        ConfigError: svd_segments without a plain floating-point weight.
    """
    d_in, d_out = _get_in_out_features(base)
    assert d_in is not None and d_out is not None  # only linear layers come here
    experts = [new_expert(config, kind, name, key, d_in, d_out) for name in names]
    saved = config.base_fingerprint is not None  # then the tensors come from the file
    if config.init != "svd_segments" or saved:
        return experts
    weight = getattr(base, "weight", None)
    if weight is None or not weight.is_floating_point():
        text = f"init='svd_segments' needs the weight of {key!r} in floating point, not quantised."
        raise ConfigError(text)
    if weight.is_meta:
        return experts
    weight = weight.t() if isinstance(base, Conv1D) else weight
    gated = [i for i, name in enumerate(names) if name not in config.always_on]
    if not gated:  # all that this layer has is always on: nothing to cut into segments
        return experts
    factors = svd_segments(weight, [experts[i].rank for i in gated], [experts[i].scaling for i in gated])
    made = dict(zip(gated, factors, strict=True))
    # Experts that are always on start as the gated ones do: with negative weights they cancel them.
    made |= dict(zip((i for i in range(len(names)) if i not in gated), factors, strict=False))
    return [
        e._replace(rows=kind.rows_of(Expert(*made[i], e.scaling))) if i in made else e
        for i, e in enumerate(experts)
    ]


def new_bank(config: SavedMixture, kind: Kind, key: str, base: nn.Module, *, plain: bool) -> ExpertBank:
    """Fresh experts of a kind for one layer, or its one ordinary LoRA (`plain`)."""
    if kind.by_layer and not plain:
        kind = _at_layer(config, kind, key, base)
    if plain:
        lora = Lora()
        experts = new_experts(config, lora, ["plain"], key, base)
        return ExpertBank(experts, [config.frozen_extras], config.lora_dropout, kind=lora)
    experts = new_experts(config, kind, experts_at(config, key), key, base)
    cores: TaskCores | None = None
    if config.task_cores:
        shape = "full" if config.task_cores is True else config.task_cores
        cores = CORES[shape].identity(experts[0].rank, *task_blocks(config))
    return ExpertBank(experts, frozen_at(config, key), config.lora_dropout, kind=kind, cores=cores)


def _at_layer(config: SavedMixture, kind: Kind, key: str, base: nn.Module) -> Kind:
    d_in, d_out = _get_in_out_features(base)
    assert d_in is not None and d_out is not None  # only linear layers come here
    rank = max(rank_of(config, name, key) for name in experts_at(config, key))
    weight = BaseWeight(base, key, config.kind) if kind.scales_output else None
    return kind.at(Place(d_in, d_out, rank), weight)


def new_gate(config: SavedMixture, key: str, d_in: int) -> Gate:
    """A fresh gate at the layer named `key`, whose x is d_in wide."""
    settings = config.gate
    if settings.scope == "task":
        d_in = settings.embedding_dim
    elif settings.scope in ("external", "two_pass"):
        d_in = settings.feature_dim
    place = GatePlace(
        d_in=d_in,
        blocks=placement.blocks_at(config, key),
        frozen=placement.frozen_rows_at(config, key),
        top_k=placement.top_k_at(config, key),
        tasks=task_blocks(config) if settings.scope == "task" else None,
        blend=placement.blend_at(config, key),
        # With one A for all, experts under equal weights would stay equal for ever.
        spread=config.share_A or KINDS[config.kind].one_A,
    )
    gate: Gate = SCORES[settings.score](settings, place)
    gate.freeze_shared(placement.shared_frozen_at(config, key))
    return gate


def init_std_report(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Standard deviation of every expert's A against what its initialisation implies.

    Rows: name, expert, r, std, expected, ratio, ok. `ok` means |ratio - 1| < 4/√(2·numel), four standard
    errors: true for untouched experts, false for trained or mis-initialised ones. Experts that started as segments of
    the base weight, or are of a kind with another start, have no row: nothing says what their spread should be.
    """
    rows = []
    points = (m for m in model.modules() if isinstance(m, MountPoint))
    for mount in (mount for point in points for mount in point.mounts.values()):
        config = mount.config
        if (config.init == "svd_segments" and not mount.plain) or not mount.bank.kind.starts_by_init:
            continue
        names = ["plain"] if mount.plain else experts_at(config, mount.key)
        for name, expert in zip(names, mount.bank.experts(), strict=True):
            A, r = expert.A.detach(), expert.rank
            expected = expected_std(config.init, A.shape[1], r, config.init_std, config.init_gain)
            std = A.float().std(correction=0).item()
            ratio = std / expected
            ok = abs(ratio - 1) < 4 / math.sqrt(2 * A.numel())
            row = {"name": mount.key, "expert": name, "r": r, "std": std, "expected": expected}
            rows.append({**row, "ratio": ratio, "ok": ok})
    return rows

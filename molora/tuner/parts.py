"""From config to parts: an expert's rank, scaling and factors, a gate's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config.choices import KINDS
from molora.errors import ConfigError
from molora.experts.bank import Expert, ExpertRows
from molora.experts.init import expected_std, init_A, svd_segments
from molora.experts.kinds.kind import Kind
from molora.gates.gate import Gate
from molora.gates.registry import SCORES
from molora.gates.rows import GateRows
from molora.tuner.config import ExpertSpec, MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.placement import (
    blend_at,
    blocks_at,
    by_layer,
    experts_at,
    frozen_rows_at,
    shared_frozen_at,
    task_blocks,
    top_k_at,
)
from molora.tuner.targets import pattern_value


def rank_of(config: MoLoraConfig, expert: str, key: str) -> int:
    """The rank of one expert in the layer named `key`."""
    spec = config.expert_specs.get(expert)
    if spec is not None:
        return int(pattern_value(spec.rank_pattern, key, spec.r))
    if isinstance(config.r, list):
        return int(by_layer(config.r, key, "r"))
    return int(pattern_value(config.rank_pattern, key, config.r))


def scaling_of(config: MoLoraConfig, expert: str, key: str) -> float:
    """The scaling of one expert in the layer named `key`."""
    spec: ExpertSpec | MoLoraConfig = config.expert_specs.get(expert, config)
    if isinstance(spec.scaling, (int, float)):
        return float(spec.scaling)
    alpha, r = float(pattern_value(spec.alpha_pattern, key, spec.lora_alpha)), rank_of(config, expert, key)
    if spec.scaling == "alpha":
        return alpha
    return alpha / math.sqrt(r) if spec.use_rslora or spec.scaling == "alpha_over_sqrt_r" else alpha / r


def kind_of(config: MoLoraConfig) -> Kind:
    """The kind of a config's experts, with its settings."""
    return KINDS[config.kind](share_A=config.share_A, **config.kind_settings)


def new_expert(
    config: MoLoraConfig,
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
    config: MoLoraConfig, kind: Kind, names: Sequence[str], key: str, base: nn.Module
) -> list[ExpertRows]:
    """Fresh experts for one layer, from its base layer's weight where `init` asks for that.

    Raises:
        ConfigError: svd_segments without a plain floating-point weight.
    """
    d_in, d_out = _get_in_out_features(base)
    assert d_in is not None and d_out is not None  # only linear layers come here
    experts = [new_expert(config, kind, name, key, d_in, d_out) for name in names]
    if (
        config.init != "svd_segments" or config.base_fingerprint is not None
    ):  # saved: tensors come from the file
        return experts
    weight = getattr(base, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise ConfigError(
            f"init='svd_segments' needs the weight of {key!r} in floating point, not quantised."
        )
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


def new_gate(config: MoLoraConfig, key: str, d_in: int) -> Gate:
    """A fresh gate: small random rows (a zero router never breaks ties), zeros for a constant table and biases."""
    gate, blocks, frozen = config.gate, blocks_at(config, key), frozen_rows_at(config, key)
    experts = len(frozen)
    options: dict[str, Any] = {"top_k": top_k_at(config, key), "num_experts": experts}
    if gate.scope == "constant":
        shape = (experts, gate.splits) if gate.splits > 1 else (experts,)
        # With one A for all, experts under equal weights would stay equal for ever.
        weight = gate.start + (torch.randn(shape) * gate.init_std if config.share_A else torch.zeros(shape))
        return Gate(gate, GateRows(weight, blocks, frozen), **options)
    if gate.scope == "task":
        width = experts * gate.splits if gate.score == "table" else gate.embedding_dim
        task_parts, task_frozen = task_blocks(config)
        std = gate.init_std if gate.score == "table" else 1.0
        options["tasks"] = GateRows(torch.randn(len(task_frozen), width) * std, task_parts, task_frozen)
        if gate.score == "table":
            return Gate(gate, None, **options)
    d_in, blends = _reads(config, d_in), gate.blend == "sequence"
    if gate.score in SCORES:
        options["custom"] = SCORES[gate.score](d_in, experts)
    hidden = torch.nn.Linear(d_in, gate.hidden) if gate.score == "mlp" else None
    width = d_in if hidden is None else gate.hidden
    rows = GateRows(torch.randn(experts, width) * gate.init_std, blocks, frozen)
    made = Gate(
        gate,
        None if "custom" in options else rows,
        bias=GateRows(torch.zeros(experts), blocks, frozen) if gate.bias else None,
        hidden=hidden,
        threshold=torch.nn.Linear(d_in, 1) if gate.threshold_learned else None,
        second=GateRows(torch.randn(experts, d_in) * gate.init_std, blocks, frozen) if blends else None,
        blend=blend_at(config, key) if blends else 0.0,
        **options,
    )
    made.freeze_shared(shared_frozen_at(config, key))
    return made


def _reads(config: MoLoraConfig, d_in: int) -> int:
    """Width of what a gate reads."""
    gate = config.gate
    if gate.scope == "task":
        return gate.embedding_dim
    return gate.feature_dim if gate.scope in ("external", "two_pass") else d_in


def init_std_report(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Standard deviation of every expert's A against what its initialisation implies.

    Rows: name, expert, r, std, expected, ratio, ok. `ok` means |ratio - 1| < 4/√(2·numel), four standard
    errors: true for untouched experts, false for trained or mis-initialised ones. Experts that started as segments of
    the base weight, or are of a kind with another start, have no row: nothing says what their spread should be.
    """
    rows = []
    for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
        for adapter, site in layer.sites.items():
            config: MoLoraConfig = layer.context.adapters[adapter].config
            bank = layer.molora_experts[adapter]
            if (config.init == "svd_segments" and not site.plain) or not bank.kind.starts_by_init:
                continue
            names = ["plain"] if site.plain else experts_at(config, site.key)
            for name, expert in zip(names, bank.experts(), strict=True):
                std = expert.A.detach().float().std(correction=0).item()
                expected = expected_std(
                    config.init, expert.A.shape[1], expert.rank, config.init_std, config.init_gain
                )
                ratio = std / expected
                ok = abs(ratio - 1) < 4 / math.sqrt(2 * expert.A.numel())
                found = {"name": site.key, "expert": name, "r": expert.rank, "std": std, "expected": expected}
                rows.append({**found, "ratio": ratio, "ok": ok})
    return rows

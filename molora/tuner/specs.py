"""From config to parts: an expert's rank, scaling and factors, a gate's rows, a mixture's static weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.experts.bank import Expert
from molora.experts.init import expected_std, init_A
from molora.gates.gate import Gate
from molora.gates.scores import GateRows
from molora.tuner.config import ExpertSpec, MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.targets import block_index, pattern_value


def rank_of(config: MoLoraConfig, expert: str, key: str) -> int:
    """The rank of one expert in the layer named `key`."""
    spec = config.expert_specs.get(expert)
    if spec is not None:
        return int(pattern_value(spec.rank_pattern, key, spec.r))
    r: Any = config.r
    if isinstance(r, list):
        index = block_index(key)
        if index is None or index >= len(r):
            raise ConfigError(
                f"r is a list of {len(r)} ranks, one per block, but {key!r} lies in block {index}."
            )
        return r[index]
    return int(pattern_value(config.rank_pattern, key, r))


def scaling_of(config: MoLoraConfig, expert: str, key: str) -> float:
    """The scaling of one expert in the layer named `key`."""
    spec: ExpertSpec | MoLoraConfig = config.expert_specs.get(expert, config)
    if isinstance(spec.scaling, (int, float)):
        return float(spec.scaling)
    alpha, r = float(pattern_value(spec.alpha_pattern, key, spec.lora_alpha)), rank_of(config, expert, key)
    if spec.scaling == "alpha":
        return alpha
    return alpha / math.sqrt(r) if spec.use_rslora or spec.scaling == "alpha_over_sqrt_r" else alpha / r


def new_expert(
    config: MoLoraConfig,
    name: str,
    key: str,
    d_in: int,
    d_out: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Expert:
    """A fresh expert for one layer: A initialised, B = 0."""
    r = rank_of(config, name, key)
    A = init_A(torch.empty(r, d_in), config.init, config.init_std, config.init_gain)
    A = A.to(device=device, dtype=dtype)
    return Expert(A, A.new_zeros(d_out, r), scaling_of(config, name, key))


def new_gate(config: MoLoraConfig, d_in: int) -> Gate:
    """A fresh gate: small random rows (a zero router never breaks ties), zeros for a table and biases."""
    gate, blocks, frozen = config.gate, config.block_indices(), config.frozen_flags()
    zeros = torch.zeros(config.num_experts)
    if gate.score == "table":
        return Gate(gate, GateRows(zeros, blocks, frozen))
    hidden = torch.nn.Linear(d_in, gate.hidden) if gate.score == "mlp" else None
    width = d_in if hidden is None else gate.hidden
    made = Gate(
        gate,
        GateRows(torch.randn(config.num_experts, width) * gate.init_std, blocks, frozen),
        bias=GateRows(zeros, blocks, frozen) if gate.bias else None,
        hidden=hidden,
        threshold=torch.nn.Linear(d_in, 1) if gate.threshold_learned else None,
    )
    made.frozen_shared = config.frozen_extras
    made.apply_freeze()
    return made


def named_weights(config: MoLoraConfig, given: Mapping[str, float] | Sequence[float]) -> list[float]:
    """Weights in expert order from `{expert: weight}` (others 0) or a full list."""
    names = config.expert_names or []
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise ConfigError(
                    f"unknown expert {name!r}.{did_you_mean(name, names)} Experts: {', '.join(names)}."
                )
        return [float(given.get(name, 0.0)) for name in names]
    if len(given) != len(names):
        raise ConfigError(f"{len(given)} expert weights for {len(names)} experts ({', '.join(names)}).")
    return [float(weight) for weight in given]


def static_weights(
    config: MoLoraConfig,
    layer: MoLoraLayer,
    adapter: str,
    task: str | None = None,
    expert_weights: Mapping[str, float] | Sequence[float] | None = None,
) -> list[float]:
    """One layer's expert weights where they do not depend on x.

    Raises:
        ConfigError: they do depend on x; the message says which calls are exact.
    """
    if layer.sites[adapter].plain:
        return [1.0]
    if expert_weights is not None:
        return named_weights(config, expert_weights)
    gate, task_map = layer.gate_of(adapter), config.task_map()
    if gate is not None and task is None and (config.gate.scope == "constant" or config.num_experts == 1):
        if config.num_experts == 1:
            return [1.0]
        with torch.no_grad():
            training, gate.training = gate.training, False
            weights = gate.static_weights().tolist()
            gate.training = training
        return weights
    if gate is None:
        if task is None and len(task_map.ids) == 1:
            task = next(iter(task_map.ids))
        if task is not None:
            chosen = task_map.experts_of(task_map.resolve(task))
            return [chosen.get(i, 0.0) for i in range(config.num_experts)]
        raise ConfigError(
            f"the weights depend on the task id; name one: merge_and_unload(task=...). Tasks: {', '.join(task_map.ids)}."
        )
    visible = None if task is None else task_map.visible(task_map.resolve(task), own_only=True)
    if visible is not None and len(visible) == 1:  # a gate over one expert has nothing to decide
        return [float(i == visible[0]) for i in range(config.num_experts)]
    raise ConfigError(
        f"the gate's weights depend on the input (gate.scope={config.gate.scope!r}), so no merged weight equals the mixture.",
        hint="merge fixed weights with expert_weights={...}, or keep the adapter unmerged.",
    )


def init_std_report(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Standard deviation of every expert's A against what its initialisation implies.

    Rows: name, expert, r, std, expected, ratio, ok. `ok` means |ratio - 1| < 4/√(2·numel), four standard
    errors: true for untouched experts, false for trained or mis-initialised ones.
    """
    rows = []
    for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
        for adapter, site in layer.sites.items():
            config: MoLoraConfig = layer.context.adapters[adapter].config
            bank = layer.molora_experts[adapter]
            names = ["plain"] if site.plain else config.expert_names or []
            for name, expert in zip(names, bank.experts(), strict=True):
                std = expert.A.detach().float().std(correction=0).item()
                expected = expected_std(
                    config.init, expert.A.shape[1], expert.rank, config.init_std, config.init_gain
                )
                ratio = std / expected
                ok = abs(ratio - 1) < 4 / math.sqrt(2 * expert.A.numel())
                rows.append(
                    {
                        "name": site.key,
                        "expert": name,
                        "r": expert.rank,
                        "std": std,
                        "expected": expected,
                        "ratio": ratio,
                        "ok": ok,
                    }
                )
    return rows

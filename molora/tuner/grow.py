"""Growing and shrinking a mixture: add, remove, freeze and unfreeze experts in every layer at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F

from molora.calls.call import AdapterRouting, RoutingContext
from molora.config.gate_rules import UNNORMALISED
from molora.config.names import check_name
from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.experts.bank import Expert, ExpertBank, ExpertRows, mean_delta
from molora.experts.init import low_rank
from molora.gates.gate import Gate
from molora.tuner.config import ExpertSpec, MoLoraConfig, as_sequence
from molora.tuner.config_checks import normalise
from molora.tuner.layer import MoLoraLayer
from molora.tuner.parts import new_expert
from molora.tuner.placement import (
    blocks_at,
    experts_at,
    frozen_at,
    frozen_rows_at,
    names_at,
    shared_frozen_at,
    task_blocks,
    top_k_at,
)


def add_expert(
    model: nn.Module,
    context: RoutingContext,
    adapter: str,
    name: str,
    *,
    tasks: Sequence[str] = (),
    init: str = "new",
    freeze_others: bool = True,
    isolate: bool = False,
    spec: ExpertSpec | None = None,
    factors: Callable[[str, Expert], Expert] | None = None,
) -> None:
    """Append one expert to every bank of an adapter, and its row to every learned gate.

    The new gate row is a Parameter of its own, so old logits stay bit-equal. Old weights do not: the
    softmax has one more term. Old *outputs* are bit-equal under task routing.

    Args:
        model: the base model the adapter lives in.
        context: its routing context.
        adapter: which adapter.
        name: the new expert's name.
        tasks: tasks it serves. New ones get the next free id; under a task gate they use this expert
            only, under a learned gate every expert there is. Known ones gain it.
        init: "new" (B = 0), "copy:<expert>" or "mean" (SVD of the mean update).
        freeze_others: freeze the other experts, their gate rows, plain LoRAs and heads.
        isolate: hide the expert from older tasks wherever task ids are given.
        spec: rank and scaling that differ from the config's (imports).
        factors: maps (layer name, fresh expert) to the expert to use instead (imports).
    """
    config: MoLoraConfig = context.adapters[adapter].config
    check_name(name, "expert")
    for i, task in enumerate(tasks):
        check_name(task, "task")
        if task in tasks[:i]:
            raise ConfigError(f"tasks names {task!r} twice.")
    if name in (config.expert_names or []):
        raise ConfigError(
            f"there is an expert {name!r} already. Experts: {', '.join(config.expert_names or [])}."
        )
    _check_growable(model, config, adapter, spec, by_factors=init == "mean" or factors is not None)
    source = _source(config, init)
    if source is not None:
        spec = config.expert_specs.get(source)
    _grow_config(config, name, tasks, spec, freeze_others=freeze_others, isolate=isolate)
    for layer in _layers(model, adapter):
        bank, site = layer.molora_experts[adapter], layer.sites[adapter]
        if site.plain:
            bank.assign(bank.rows(), [config.frozen_extras])
            continue
        here = [n for n in experts_at(config, site.key) if n != name]
        local = here.index(source) if source in here else None
        grown: Expert | ExpertRows = _initial(config, bank, name, site.key, init, local)
        if factors is not None:
            grown = factors(site.key, bank.effective(grown))
        bank.assign([*bank.rows(), grown], frozen_at(config, site.key))
        if bank.cores is not None:
            bank.cores.grow(*task_blocks(config))
        if adapter in layer.molora_gate:
            _grow_gate(config, layer.molora_gate[adapter], site.key, local)
    if freeze_others:
        freeze_heads(model, adapter)
    _refresh(model, context, adapter)


def _grow_gate(config: MoLoraConfig, gate: Gate, key: str, source: int | None) -> None:
    """A row for the new expert, new or copied, and one for each new task of a gate that learns from tasks."""
    for rows in gate.grown:
        weight = rows.weight.detach()
        row = weight[source] if source is not None else _new_row(gate, weight)
        rows.assign(
            torch.cat([weight, row.unsqueeze(0)]), blocks_at(config, key), frozen_rows_at(config, key)
        )
    if gate.tasks is not None:
        weight = gate.tasks.weight.detach()
        if gate.settings.score == "table":  # one more column in each split
            weight = F.pad(weight.unflatten(1, (gate.settings.splits, -1)), (0, 1))
            weight[..., -1] = (
                _new_row(gate, weight[..., :-1].movedim(-1, 0)) if source is None else weight[..., source]
            )
            weight = weight.flatten(1)
        parts, frozen = task_blocks(config)
        fresh = weight.new_zeros(len(frozen) - len(weight), weight.shape[1])
        if gate.settings.score == "embedding":
            fresh.normal_()
        for row in fresh if gate.settings.score == "table" else ():
            row.copy_(_new_row(gate, weight))
        gate.tasks.assign(torch.cat([weight, fresh]), parts, frozen)
    if gate.balance is not None:
        gate.balance = F.pad(gate.balance, (0, 1))
    gate.top_k = top_k_at(config, key)
    gate.freeze_shared(shared_frozen_at(config, key))


def _new_row(gate: Gate, rows: torch.Tensor) -> torch.Tensor:
    """Where a new expert's row starts beside those there are: at zero, unless zero is a point it could not leave.

    Then it is drawn, of their size. A weight of 0 over a B of 0 has no gradient, nor has the length of a zero vector;
    |0| is never among the best.
    """
    settings = gate.settings
    stuck = settings.transform in UNNORMALISED or settings.absolute or settings.score == "cosine"
    if settings.start or not stuck:
        return torch.full_like(rows[0], settings.start)
    size = rows.square().mean().sqrt()
    return torch.randn_like(rows[0]) * torch.where(size > 0, size, settings.init_std)


def remove_expert(
    model: nn.Module, context: RoutingContext, adapter: str, name: str, *, drop_tasks: bool = False
) -> None:
    """Remove one expert, its gate row, and its place in every task; ids of dropped tasks are not re-used."""
    config: MoLoraConfig = context.adapters[adapter].config
    _index(config, name)
    if config.num_experts == 1:
        raise ConfigError(f"{name!r} is the only expert left; delete the adapter instead.")
    for layer in _layers(model, adapter):
        if not layer.sites[adapter].plain and experts_at(config, layer.sites[adapter].key) == [name]:
            raise ConfigError(f"{name!r} is the only expert of {layer.sites[adapter].key}.")
    _check_growable(model, config, adapter, None)
    before = _experts_of_layers(model, adapter, config)
    trial = deepcopy(config)
    _shrink_config(trial, name, drop_tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the config was made
        normalise(trial)  # what could not be loaded again is refused before anything changes
    _shrink_config(config, name, drop_tasks)
    _reassign(model, adapter, config, before)
    _refresh(model, context, adapter)


def _shrink_config(config: MoLoraConfig, name: str, drop_tasks: bool) -> None:
    orphans = [task for task, experts in config.tasks.items() if set(experts) == {name}]
    if orphans and not drop_tasks:
        raise ConfigError(
            f"{name!r} is the only expert of task {', '.join(map(repr, orphans))}.",
            hint="give the task another expert first, or pass drop_tasks=True to forget the task as well.",
        )
    task_ids = config.task_ids or {}
    for task in orphans:
        del config.tasks[task], task_ids[task]
    for task, experts in config.tasks.items():
        config.tasks[task] = _without(experts, name)
    assert config.expert_names is not None and config.gate_blocks is not None
    config.expert_names.remove(name)
    config.gate_blocks = [kept for block in config.gate_blocks if (kept := [n for n in block if n != name])]
    config.frozen_experts = [n for n in config.frozen_experts if n != name]
    config.isolated_experts = [n for n in config.isolated_experts if n != name]
    config.free_rows = [n for n in config.free_rows if n != name]
    config.expert_specs.pop(name, None)
    config.always_on.pop(name, None)
    config.num_experts -= 1
    gate, most = config.gate, config.num_experts
    gate.min_k = min(gate.min_k, most)
    if isinstance(gate.top_k, dict):
        gate.top_k = {pattern: min(k, most) for pattern, k in gate.top_k.items()}
    elif isinstance(gate.top_k, list):
        gate.top_k = [min(k, most) for k in gate.top_k]
    else:
        gate.top_k = min(gate.top_k, most)
    _renorm_of_one(config)


def _renorm_of_one(config: MoLoraConfig) -> None:
    """The weight of a single chosen expert is its probability, or the gate would never learn."""
    if config.gate.select == "top_k" and config.gate.top_k == 1:
        config.gate.renorm = "none"


def set_frozen(
    model: nn.Module, context: RoutingContext, adapter: str, names: str | Sequence[str], *, frozen: bool
) -> None:
    """Freeze or unfreeze experts together with their gate rows; with the last frozen one, also what froze with them."""
    config: MoLoraConfig = context.adapters[adapter].config
    names = as_sequence(names)
    for name in names:
        _index(config, name)
    before = set(config.frozen_experts)
    after = before | set(names) if frozen else before - set(names)
    config.frozen_experts = [name for name in config.expert_names or [] if name in after]
    config.free_rows = [name for name in config.free_rows if name not in names]
    assert config.gate_blocks is not None
    parts = [[[n for n in b if n in after], [n for n in b if n not in after]] for b in config.gate_blocks]
    config.gate_blocks = [part for pair in parts for part in pair if part]
    if config.frozen_extras and not after:
        config.frozen_extras = False
        for layer in _layers(model, adapter):
            if layer.sites[adapter].plain:
                bank = layer.molora_experts[adapter]
                bank.assign(bank.rows(), [False])
        freeze_heads(model, adapter, frozen=False)
    _reassign(model, adapter, config, _experts_of_layers(model, adapter, config))
    _refresh(model, context, adapter)


def freeze_heads(model: nn.Module, adapter: str, *, frozen: bool = True) -> None:
    """Stop training the modules saved whole (`modules_to_save`) of one adapter, or train them again."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.set_requires_grad([adapter], requires_grad=not frozen)


def _layers(model: nn.Module, adapter: str) -> list[MoLoraLayer]:
    return [m for m in model.modules() if isinstance(m, MoLoraLayer) and adapter in m.molora_experts]


def _refresh(model: nn.Module, context: RoutingContext, adapter: str) -> None:
    config = context.adapters[adapter].config
    context.adapters[adapter] = AdapterRouting(config.task_map(), config)
    for layer in _layers(model, adapter):
        site = layer.sites[adapter]
        site.names = None if site.plain else names_at(config, site.key)


def _index(config: MoLoraConfig, name: str) -> int:
    names = config.expert_names or []
    if name not in names:
        raise ConfigError(f"no expert {name!r}.{did_you_mean(name, names)} Experts: {', '.join(names)}.")
    return names.index(name)


def _check_growable(
    model: nn.Module,
    config: MoLoraConfig,
    adapter: str,
    spec: ExpertSpec | None,
    *,
    by_factors: bool = False,
) -> None:
    if config.share_A and spec is not None:
        raise ConfigError("experts that share A have one rank and scaling; this one would have its own.")
    for layer in _layers(model, adapter):
        reason = layer.molora_experts[adapter].kind.imports
        if by_factors and reason is not None:
            raise ConfigError(
                f"an expert of this mixture cannot start from a weight update: {reason}.",
                hint="use init='new' or 'copy:<expert>'.",
            )
        if adapter in layer.molora_gate and layer.molora_gate[adapter].custom is not None:
            raise ConfigError(
                f"the score {config.gate.score!r} is a registered module, which cannot gain or lose an expert.",
                hint="make a new mixture with molora.compose, or use a built-in score.",
            )


def _source(config: MoLoraConfig, init: str) -> str | None:
    """The expert to copy, if any."""
    if init in ("new", "mean"):
        return None
    kind, _, source = init.partition(":")
    if kind != "copy" or not source:
        raise ConfigError(f"init={init!r} is not one of 'new', 'copy:<expert>', 'mean'.")
    _index(config, source)
    return source


def _initial(
    config: MoLoraConfig, bank: ExpertBank, name: str, key: str, init: str, source: int | None
) -> Expert | ExpertRows:
    if source is not None:
        return bank.row(source)
    like = bank.expert(0)
    A, B = like.A, like.B
    fresh = new_expert(config, bank.kind, name, key, A.shape[1], B.shape[0], dtype=A.dtype, device=A.device)
    if init == "mean" and bank.kind.shares_A:
        return Expert(A, torch.stack([e.B.detach() for e in bank.experts()]).mean(dim=0), fresh.scaling)
    if init == "mean":
        with torch.no_grad():
            A, B = low_rank(mean_delta(bank.experts()) / fresh.scaling, fresh.rank)
        return Expert(A.to(like.A.dtype), B.to(like.A.dtype), fresh.scaling)
    return fresh


def _grow_config(
    config: MoLoraConfig,
    name: str,
    tasks: Sequence[str],
    spec: ExpertSpec | None,
    *,
    freeze_others: bool,
    isolate: bool,
) -> None:
    assert config.expert_names is not None and config.gate_blocks is not None and config.task_ids is not None
    if freeze_others:
        config.frozen_experts, config.free_rows = list(config.expert_names), []
        config.frozen_extras = True
    config.expert_names.append(name)
    config.num_experts += 1
    _renorm_of_one(config)
    config.gate_blocks.append([name])
    if spec is not None:
        config.expert_specs[name] = spec
    if isolate:
        config.isolated_experts.append(name)
    config.inference_mode = False
    for task in tasks:
        if task in config.tasks:
            config.tasks[task] = _with(config.tasks[task], name)
            continue
        config.tasks[task] = list(config.expert_names) if config.gate.learned else [name]
        config.task_ids[task] = config.next_task_id or 0
        config.next_task_id = config.task_ids[task] + 1


def _with(experts: Any, name: str) -> Any:
    if isinstance(experts, dict):  # the newcomer gets the mean weight; the sum stays
        share = sum(experts.values()) / (len(experts) + 1)
        factor = 1 - 1 / (len(experts) + 1)
        return {**{expert: weight * factor for expert, weight in experts.items()}, name: share}
    return [*experts, name]


def _without(experts: Any, name: str) -> Any:
    if not isinstance(experts, dict):
        return [expert for expert in experts if expert != name]
    kept = {expert: weight for expert, weight in experts.items() if expert != name}
    scale = sum(experts.values()) / (sum(kept.values()) or 1.0)
    return {expert: weight * scale for expert, weight in kept.items()}


def _experts_of_layers(model: nn.Module, adapter: str, config: MoLoraConfig) -> dict[str, list[str]]:
    keys = [layer.sites[adapter].key for layer in _layers(model, adapter) if not layer.sites[adapter].plain]
    return {key: experts_at(config, key) for key in keys}


def _reassign(
    model: nn.Module, adapter: str, config: MoLoraConfig, before: Mapping[str, Sequence[str]]
) -> None:
    """Rebuild banks and gates under the config's present experts and freezing; `before`: a layer's experts so far."""
    for layer in _layers(model, adapter):
        key = layer.sites[adapter].key
        if key not in before:  # a plain LoRA
            continue
        bank, now = layer.molora_experts[adapter], experts_at(config, key)
        kept = [i for i, name in enumerate(before[key]) if name in now]
        rows = bank.rows()
        bank.assign([rows[i] for i in kept], frozen_at(config, key))
        if bank.cores is not None:
            bank.cores.assign(bank.cores.weight.detach(), *task_blocks(config))
        if adapter in layer.molora_gate:
            _shrink_gate(config, layer.molora_gate[adapter], key, kept)


def _shrink_gate(config: MoLoraConfig, gate: Gate, key: str, kept: list[int]) -> None:
    for rows in gate.grown:
        rows.assign(rows.weight.detach()[kept], blocks_at(config, key), frozen_rows_at(config, key))
    if gate.tasks is not None:
        weight = gate.tasks.weight.detach()
        if gate.settings.score == "table":
            weight = weight.unflatten(1, (gate.settings.splits, -1))[..., kept].flatten(1)
        gate.tasks.assign(weight, *task_blocks(config))
    if gate.balance is not None:
        gate.balance = gate.balance[kept]
    gate.top_k = top_k_at(config, key)
    gate.freeze_shared(shared_frozen_at(config, key))

"""Growing and shrinking a mixture: add, remove, freeze and unfreeze experts in every layer at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from molora.config.names import check_name
from molora.config.suggest import did_you_mean
from molora.context import RoutingContext
from molora.errors import ConfigError
from molora.experts.bank import Expert, ExpertBank, mean_delta
from molora.experts.init import low_rank
from molora.tuner.config import ExpertSpec, MoLoraConfig, as_sequence
from molora.tuner.layer import MoLoraLayer
from molora.tuner.specs import new_expert, scaling_of


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
    for task in tasks:
        check_name(task, "task")
    if name in (config.expert_names or []):
        raise ConfigError(
            f"there is an expert {name!r} already. Experts: {', '.join(config.expert_names or [])}."
        )
    source = _source(config, init)
    if source is not None:
        spec = config.expert_specs.get(config.expert_names[source])  # type: ignore[index]
    _grow_config(config, name, tasks, spec, freeze_others=freeze_others, isolate=isolate)
    for layer in _layers(model, adapter):
        bank = layer.molora_experts[adapter]
        key = layer.sites[adapter].key
        if layer.sites[adapter].plain:
            bank.assign(bank.experts(), [config.frozen_extras])
            continue
        grown = [*bank.experts(), _initial(config, bank, name, key, init, source)]
        if factors is not None:
            grown[-1] = factors(key, grown[-1])
        bank.assign(grown, config.frozen_flags())
        if adapter in layer.molora_gate:
            gate = layer.molora_gate[adapter]
            for rows in gate.grown:
                weight = rows.weight.detach()
                row = weight[source] if source is not None else torch.zeros_like(weight[0])
                grown_rows = torch.cat([weight, row.unsqueeze(0)])
                rows.assign(grown_rows, config.block_indices(), config.frozen_flags())
            gate.frozen_shared = config.frozen_extras
            gate.apply_freeze()
    if freeze_others:
        freeze_heads(model, adapter)
    _refresh(context, adapter)


def remove_expert(
    model: nn.Module, context: RoutingContext, adapter: str, name: str, *, drop_tasks: bool = False
) -> None:
    """Remove one expert, its gate row, and its place in every task; ids of dropped tasks are not re-used."""
    config: MoLoraConfig = context.adapters[adapter].config
    index = _index(config, name)
    if config.num_experts == 1:
        raise ConfigError(f"{name!r} is the only expert left; delete the adapter instead.")
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
    config.expert_specs.pop(name, None)
    config.num_experts -= 1
    config.gate.top_k = min(config.gate.top_k, config.num_experts)
    remaining = [i for i in range(config.num_experts + 1) if i != index]
    _reassign(model, adapter, config, remaining)
    _refresh(context, adapter)


def set_frozen(
    model: nn.Module, context: RoutingContext, adapter: str, names: str | Sequence[str], *, frozen: bool
) -> None:
    """Freeze or unfreeze experts together with their gate rows."""
    config: MoLoraConfig = context.adapters[adapter].config
    names = as_sequence(names)
    for name in names:
        _index(config, name)
    before = set(config.frozen_experts)
    after = before | set(names) if frozen else before - set(names)
    config.frozen_experts = [name for name in config.expert_names or [] if name in after]
    assert config.gate_blocks is not None
    parts = [[[n for n in b if n in after], [n for n in b if n not in after]] for b in config.gate_blocks]
    config.gate_blocks = [part for pair in parts for part in pair if part]
    _reassign(model, adapter, config, list(range(config.num_experts)))
    _refresh(context, adapter)


def freeze_heads(model: nn.Module, adapter: str) -> None:
    """Stop training the modules saved whole (`modules_to_save`) of one adapter."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.set_requires_grad([adapter], requires_grad=False)


def _layers(model: nn.Module, adapter: str) -> list[MoLoraLayer]:
    return [m for m in model.modules() if isinstance(m, MoLoraLayer) and adapter in m.molora_experts]


def _refresh(context: RoutingContext, adapter: str) -> None:
    context.adapters[adapter].task_map = context.adapters[adapter].config.task_map()


def _index(config: MoLoraConfig, name: str) -> int:
    names = config.expert_names or []
    if name not in names:
        raise ConfigError(f"no expert {name!r}.{did_you_mean(name, names)} Experts: {', '.join(names)}.")
    return names.index(name)


def _source(config: MoLoraConfig, init: str) -> int | None:
    if init in ("new", "mean"):
        return None
    kind, _, source = init.partition(":")
    if kind != "copy" or not source:
        raise ConfigError(f"init={init!r} is not one of 'new', 'copy:<expert>', 'mean'.")
    return _index(config, source)


def _initial(
    config: MoLoraConfig, bank: ExpertBank, name: str, key: str, init: str, source: int | None
) -> Expert:
    if source is not None:
        copied = bank.expert(source)
        return Expert(copied.A.detach().clone(), copied.B.detach().clone(), copied.scaling)
    like = bank.expert(0)
    fresh = new_expert(
        config, name, key, like.A.shape[1], like.B.shape[0], dtype=like.A.dtype, device=like.A.device
    )
    if init == "mean":
        with torch.no_grad():
            A, B = low_rank(mean_delta(bank.experts()) / fresh.scaling, fresh.rank)
        fresh = Expert(A.to(fresh.A.dtype), B.to(fresh.A.dtype), scaling_of(config, name, key))
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
        config.frozen_experts = list(config.expert_names)
        config.frozen_extras = True
    config.expert_names.append(name)
    config.num_experts += 1
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
        config.tasks[task] = [name] if config.gate.scope == "task" else list(config.expert_names)
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


def _reassign(model: nn.Module, adapter: str, config: MoLoraConfig, kept: list[int]) -> None:
    """Rebuild banks and gates from the kept experts under the config's present freezing."""
    for layer in _layers(model, adapter):
        if layer.sites[adapter].plain:
            continue
        bank = layer.molora_experts[adapter]
        experts = bank.experts()
        bank.assign([experts[i] for i in kept], config.frozen_flags())
        if adapter in layer.molora_gate:
            for rows in layer.molora_gate[adapter].grown:
                weight: Tensor = rows.weight.detach()
                rows.assign(weight[kept], config.block_indices(), config.frozen_flags())

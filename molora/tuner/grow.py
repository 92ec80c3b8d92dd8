"""Growing and shrinking a mixture: add, remove, freeze and unfreeze experts in every layer at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F

from molora.calls.context import AdapterRouting, RoutingContext
from molora.config.gate_rules import UNNORMALISED
from molora.config.normalise import normalise
from molora.config.roster import added, removed, weighed
from molora.config.roster import frozen as with_frozen
from molora.errors import ConfigError
from molora.experts.bank import Expert, ExpertBank, ExpertRows
from molora.experts.products import weighed as weighed_experts
from molora.forward.mount import Mount, MountPoint
from molora.forward.prompts import PROMPTS
from molora.gates.gate import Gate
from molora.gates.starts import std_of
from molora.tuner.api import config_of
from molora.tuner.config import ExpertSpec, MoLoraConfig, as_sequence
from molora.tuner.loan import own
from molora.tuner.parts import new_expert
from molora.tuner.placement import blocks_at, experts_at, frozen_at, frozen_rows_at, place, task_blocks
from molora.tuner.prompts import grown, reassigned


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
    factors: Callable[[str, Expert], Expert | ExpertRows] | None = None,
) -> None:
    """Append one expert to every bank of an adapter in a model, and its row to every learned gate.

    The new gate row is a Parameter of its own, so old logits stay bit-equal. Old weights do not: the
    softmax has one more term. Old *outputs* are bit-equal under task routing.

    Args:
        tasks: those it serves. New ones get the next free id; under a task gate they use this expert
            only, under a learned gate every expert there is. Known ones gain it.
        init: "new" (B = 0), "copy:<expert>" or "mean" (SVD of the mean update).
        freeze_others: freeze the other experts, their gate rows, plain LoRAs and heads.
        isolate: hide the expert from older tasks wherever task ids are given.
        spec: rank and scaling that differ from the config's (imports).
        factors: maps (layer name, fresh expert) to the expert to use instead (imports).
    """
    config = own(model, context, adapter)
    _check_growable(model, config, adapter, spec, mean=init == "mean", imported=factors is not None)
    source = _source(config, init)
    if source is not None:
        spec = config.expert_specs.get(source)
    how = {"learned": config.gate.learned, "freeze_others": freeze_others, "isolate": isolate}
    added(config.roster, name, tasks, spec=spec, **how).write(config)
    config.inference_mode = False
    for mount in mounts_of(model, adapter):
        bank = mount.bank
        if mount.plain:
            bank.assign(bank.rows(), [config.frozen_extras])
            continue
        here = [n for n in experts_at(config, mount.key) if n != name]
        local = here.index(source) if source in here else None
        expert = _initial(config, bank, name, mount.key, init, local)
        if factors is not None:
            assert isinstance(expert, ExpertRows)  # imports start from a new expert
            expert = factors(mount.key, bank.effective(expert))
        bank.assign([*bank.rows(), expert], frozen_at(config, mount.key))
        if bank.cores is not None:
            bank.cores.grow(*task_blocks(config))
        if mount.gate is not None:
            _grow_gate(config, mount.gate, mount.key, local)
    prompts = context.adapters[adapter].prompts
    if prompts is not None:
        local = None if source is None else config.roster.index(source)
        grown(config, model, prompts, init, local)
        if prompts.gate is not None:
            _grow_gate(config, prompts.gate, PROMPTS, local)
    if freeze_others:
        freeze_heads(model, adapter)
    refresh(model, context, adapter)


def _grow_gate(config: MoLoraConfig, gate: Gate, key: str, source: int | None) -> None:
    """A row for the new expert, new or copied, and one for each new task of a gate that learns from tasks."""
    for rows in gate.grown:
        weight = rows.weight.detach()
        row = _new_row(gate, weight) if source is None else weight[source]
        rows.assign(torch.cat([weight, row[None]]), blocks_at(config, key), frozen_rows_at(config, key))
    if gate.tasks is not None:
        weight, table = gate.tasks.weight.detach(), gate.settings.score == "table"
        if table:  # one more column in each split
            splits = weight.unflatten(1, (gate.settings.splits, -1))
            column = _new_row(gate, splits.movedim(-1, 0)) if source is None else splits[..., source]
            weight = torch.cat([splits, column.unsqueeze(-1)], dim=-1).flatten(1)
        parts, frozen = task_blocks(config)
        fresh = weight.new_zeros(len(frozen) - len(weight), weight.shape[1])
        if gate.settings.score == "embedding":
            fresh.normal_()
        for row in fresh if table else ():
            row.copy_(_new_row(gate, weight))
        gate.tasks.assign(torch.cat([weight, fresh]), parts, frozen)
    if gate.balance is not None:
        gate.balance = F.pad(gate.balance, (0, 1))


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
    return torch.randn_like(rows[0]) * torch.where(size > 0, size, std_of(settings, rows.shape[-1]))


def remove_expert(
    model: nn.Module, context: RoutingContext, adapter: str, name: str, *, drop_tasks: bool = False
) -> None:
    """Remove one expert, its gate row, and its place in every task; ids of dropped tasks are not re-used."""
    config = own(model, context, adapter)
    shrunk = removed(config.roster, name, drop_tasks=drop_tasks)
    for mount in mounts_of(model, adapter):
        if not mount.plain and experts_at(config, mount.key) == [name]:
            raise ConfigError(f"{name!r} is the only expert of {mount.key}.")
    _check_growable(model, config, adapter, None)
    before = _experts_of_layers(model, adapter, config)
    trial = deepcopy(config)
    shrunk.write(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the config was made
        normalise(trial)  # what could not be loaded again is refused before anything changes
    shrunk.write(config)
    _reassign(model, context, adapter, config, before)
    refresh(model, context, adapter)


def set_frozen(
    model: nn.Module, context: RoutingContext, adapter: str, names: str | Sequence[str], *, frozen: bool
) -> None:
    """Freeze or unfreeze experts together with their gate rows; with the last frozen one, also what froze with them."""
    config = own(model, context, adapter)
    before = config.roster
    after = with_frozen(before, as_sequence(names), frozen)
    after.write(config)
    if before.frozen_extras and not after.frozen_extras:
        for mount in mounts_of(model, adapter):
            if mount.plain:
                mount.bank.assign(mount.bank.rows(), [False])
        freeze_heads(model, adapter, frozen=False)
    _reassign(model, context, adapter, config, _experts_of_layers(model, adapter, config))
    refresh(model, context, adapter)


def weigh_tasks(
    model: nn.Module, context: RoutingContext, adapter: str, tasks: Mapping[str, Mapping[str, float]]
) -> None:
    """Give tasks other experts, or other weights, and nothing else: no parameter changes."""
    config = own(model, context, adapter)
    weighed(config.roster, tasks).write(config)
    refresh(model, context, adapter)


def freeze_heads(model: nn.Module, adapter: str, *, frozen: bool = True) -> None:
    """Stop training the modules saved whole (`modules_to_save`) of one adapter, or train them again."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.set_requires_grad([adapter], requires_grad=not frozen)


def mounts_of(model: nn.Module, adapter: str) -> list[Mount]:
    """One adapter at every layer that has it."""
    points = (m for m in model.modules() if isinstance(m, MountPoint) and adapter in m.mounts)
    return [point.mounts[adapter] for point in points]


def refresh(model: nn.Module, context: RoutingContext, adapter: str) -> None:
    """Let the forward path see what the config says by now."""
    config = config_of(context, adapter)
    before = context.adapters[adapter]
    context.adapters[adapter] = AdapterRouting(
        config.task_map(), config, before.router, before.read, before.along, before.prompts
    )
    if before.router is not None:
        before.router.set_tasks([*(config.task_ids or {}).values()])
    for mount in mounts_of(model, adapter):
        place(mount, config)


def _check_growable(
    model: nn.Module,
    config: MoLoraConfig,
    adapter: str,
    spec: ExpertSpec | None,
    *,
    mean: bool = False,
    imported: bool = False,
) -> None:
    if config.share_A and spec is not None:
        raise ConfigError("experts that share A have one rank and scaling; this one would have its own.")
    for mount in mounts_of(model, adapter):
        kind = mount.bank.kind
        reason = kind.imports or (kind.averages if mean else None)
        if (mean or imported) and reason is not None:
            text = f"an expert of this mixture cannot start from a weight update: {reason}."
            raise ConfigError(text, hint="use init='new' or 'copy:<expert>'.")
        if mount.gate is not None and mount.gate.custom is not None:
            text = f"the score {config.gate.score!r} is a registered module, which cannot gain or lose an expert."
            hint = "make a new mixture with molora.compose, or use a built-in score."
            raise ConfigError(text, hint=hint)


def _source(config: MoLoraConfig, init: str) -> str | None:
    """The expert to copy, if any."""
    if init in ("new", "mean"):
        return None
    kind, _, source = init.partition(":")
    if kind != "copy" or not source:
        raise ConfigError(f"init={init!r} is not one of 'new', 'copy:<expert>', 'mean'.")
    config.roster.index(source)
    return source


def _initial(
    config: MoLoraConfig, bank: ExpertBank, name: str, key: str, init: str, source: int | None
) -> Expert | ExpertRows:
    if source is not None:
        return bank.row(source)
    like = bank.expert(0)
    A, B = like.A, like.B
    fresh = new_expert(config, bank.kind, name, key, A.shape[1], B.shape[0], dtype=A.dtype, device=A.device)
    if init == "mean":
        experts, shares_A = bank.experts(), bank.kind.shares_A
        even = [1 / len(experts)] * len(experts)
        return weighed_experts(experts, even, fresh.rank, fresh.scaling, shares_A=shares_A)
    return fresh


def _experts_of_layers(model: nn.Module, adapter: str, config: MoLoraConfig) -> dict[str, list[str]]:
    keys = [mount.key for mount in mounts_of(model, adapter) if not mount.plain]
    return {PROMPTS: config.roster.names, **{key: experts_at(config, key) for key in keys}}


def _reassign(
    model: nn.Module,
    context: RoutingContext,
    adapter: str,
    config: MoLoraConfig,
    before: Mapping[str, Sequence[str]],
) -> None:
    """Rebuild banks and gates under the config's present experts and freezing; `before`: a layer's experts so far."""
    for mount in mounts_of(model, adapter):
        if mount.plain:
            continue
        bank, key, now = mount.bank, mount.key, experts_at(config, mount.key)
        kept = [i for i, name in enumerate(before[key]) if name in now]
        rows = bank.rows()
        bank.assign([rows[i] for i in kept], frozen_at(config, key))
        if bank.cores is not None:
            bank.cores.assign(bank.cores.weight.detach(), *task_blocks(config))
        if mount.gate is not None:
            _shrink_gate(config, mount.gate, key, kept)
    prompts = context.adapters[adapter].prompts
    if prompts is not None:
        kept = [i for i, name in enumerate(before[PROMPTS]) if name in (config.expert_names or ())]
        reassigned(config, prompts, kept)
        if prompts.gate is not None:
            _shrink_gate(config, prompts.gate, PROMPTS, kept)


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

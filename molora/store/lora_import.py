"""Bring an ordinary PEFT LoRA in as an expert of a mixture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from molora.assets import FIRST, TINY
from molora.errors import AdapterError
from molora.experts.bank import Expert, ExpertRows
from molora.forward.mount import Mount
from molora.store.adapter import active_adapter, peft_model
from molora.store.lora_folder import LoraFolder, read_lora
from molora.tuner.api import find_context
from molora.tuner.config import MoLoraConfig
from molora.tuner.grow import add_expert
from molora.tuner.layer import MoLoraLayer
from molora.tuner.loan import own
from molora.tuner.placement import experts_at, frozen_at
from molora.tuner.prompts import refuse_prompts


@dataclass(frozen=True)
class Imported:
    """The result of an import: the expert, in how many layers it has factors, and which tensors were skipped."""

    expert: str
    layers: int
    skipped: tuple[str, ...]


def import_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    expert: str,
    tasks: Sequence[str] = (),
    adapter_name: str | None = None,
) -> Imported:
    """Load a LoRA folder into the expert of that name, or into a new expert (of these tasks) where there is none.

    Rank, alpha and scaling rule are kept, so exporting the expert gives the same LoRA; a rank larger than
    the mixture's widens the stacks. Experts of kind dora take a DoRA, with its magnitudes, or a plain LoRA.
    Layers the LoRA does not cover get B = 0. A new expert's gate row is zero, and the other experts stay as they
    are. Build optimisers afterwards: Parameters are replaced. Tensors of `modules_to_save` (heads) are skipped, with
    a warning, and listed in the result. A LoRA that names another revision of the same base is imported with a
    warning: its shapes cannot tell.

    Raises:
        AdapterError: not an ordinary LoRA, or one that does not fit the model; nothing is changed then.
        ConfigError: a bad name, or a mixture whose experts have virtual tokens.
    """
    wrapped = peft_model(model)
    adapter = active_adapter(wrapped, adapter_name)
    context = find_context(wrapped)
    config = own(wrapped, context, adapter)
    refuse_prompts(config)
    lora = read_lora(folder, dora=config.kind == "dora")
    layers = [m for m in wrapped.modules() if isinstance(m, MoLoraLayer) and adapter in m.mounts]
    mounts = {layer.mounts[adapter].key: layer.mounts[adapter] for layer in layers}
    _check_fit(lora, config, mounts)
    if other := _other_revision(lora, config):
        warnings.warn(f"{folder} was trained on {other}; use that, or train it anew.", stacklevel=2)

    def factors(key: str, fresh: Expert) -> Expert | ExpertRows:
        if key not in lora.factors:
            return fresh._replace(B=torch.zeros_like(fresh.B))
        A, B = lora.factors[key]
        brought = Expert(A.to(fresh.A), B.to(fresh.B), lora.scaling(key))
        if key not in lora.magnitudes:
            return brought
        rows = mounts[key].bank.kind.rows_of(brought)
        return ExpertRows({**rows, "m": lora.magnitudes[key].to(rows["m"])}, brought.rank, brought.scaling)

    if expert in (config.expert_names or []):
        _replace(config, mounts, expert, lora, factors)
    else:
        add_expert(
            wrapped,
            context,
            adapter,
            expert,
            tasks=tasks,
            freeze_others=False,
            spec=lora.spec,
            factors=factors,
        )
    if lora.skipped:
        warnings.warn(
            f"{folder}: not imported, since heads belong to the model and not to an expert: {', '.join(lora.skipped)}",
            stacklevel=2,
        )
    return Imported(expert, len(lora.factors), lora.skipped)


def _other_revision(lora: LoraFolder, config: MoLoraConfig) -> str | None:
    """Which revision of the base a LoRA was trained on and which this is, where both are known and differ."""
    name = config.base_model_name_or_path
    theirs, ours = (
        each or (FIRST if name == TINY else None) for each in (lora.config.get("revision"), config.revision)
    )
    if name != lora.config.get("base_model_name_or_path") or None in (theirs, ours) or theirs == ours:
        return None
    return f"revision {theirs} of {name}, and this is {ours}"


def _replace(
    config: MoLoraConfig,
    mounts: Mapping[str, Mount],
    expert: str,
    lora: LoraFolder,
    factors: Callable[[str, Expert], Expert | ExpertRows],
) -> None:
    if config.share_A:
        raise AdapterError(f"{lora.path} has factors of its own, but this mixture's experts share one A.")
    config.expert_specs[expert] = lora.spec
    for key, mount in mounts.items():
        names = experts_at(config, key)
        if mount.plain or expert not in names:
            continue
        index, rank = names.index(expert), lora.rank(key)
        experts: list[Expert | ExpertRows] = [*mount.bank.rows()]
        old = mount.bank.expert(index)
        A = old.A.detach()[:rank]
        A = nn.functional.pad(A, (0, 0, 0, rank - A.shape[0]))
        fresh = Expert(A, old.B.new_zeros(old.B.shape[0], rank), lora.scaling(key))
        experts[index] = factors(key, fresh)
        mount.bank.assign(experts, frozen_at(config, key))


def _check_fit(lora: LoraFolder, config: MoLoraConfig, mounts: Mapping[str, Mount]) -> None:
    problems = []
    for key, (A, B) in lora.factors.items():
        mount = mounts.get(key)
        if mount is None or mount.plain:
            kind = "has no experts" if mount is None else "has a plain LoRA, no experts"
            problems.append(f"{key}: {kind} in this mixture (target_modules={config.target_modules!r})")
            continue
        if (why := mount.bank.kind.imports) is not None:
            raise AdapterError(f"{lora.path} cannot become an expert of this mixture: {why}.")
        like = mount.bank.expert(0)
        given, here = (A.shape[1], B.shape[0]), (like.A.shape[1], like.B.shape[0])
        if given != here:
            problems.append(f"{key}: maps {given[0]} to {given[1]}, the layer {here[0]} to {here[1]}")
        if A.shape[0] != lora.rank(key):
            problems.append(f"{key}: rank {A.shape[0]}, but its config says {lora.rank(key)}")
    if problems:
        shown = problems[:10] + [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
        raise AdapterError(
            f"{lora.path} does not fit this mixture:\n  " + "\n  ".join(shown),
            hint="add experts to those modules with target_modules, or use the base the LoRA was trained on.",
        )

"""Build a mixture out of ordinary LoRA folders: their experts frozen, a gate over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from molora.config.presets import preset_settings
from molora.config.suggest import did_you_mean
from molora.disk.fingerprint import base_modules
from molora.errors import AdapterError, ConfigError
from molora.store.lora_folder import read_lora, short_names
from molora.store.lora_import import import_lora
from molora.tuner.config import MoLoraConfig
from molora.tuner.fit_gate import METHODS, Batches, fit_gate


def compose(
    base: nn.Module,
    loras: Mapping[str, str | os.PathLike[str]],
    *,
    preset: str | None = None,
    fit: str | None = None,
    data: Batches | None = None,
    **settings: Any,
) -> PeftModel:
    """A mixture whose experts are these LoRAs, of any ranks and targets, exactly as they are.

    The experts are frozen; the gate learns, or is fitted without training (`fit`). A layer that a LoRA does not cover
    has an expert that adds nothing. `molora.routing(model, experts=[name])` gives each LoRA's own outputs.

    Args:
        base: the model the LoRAs were trained on; it is changed in place, as in PEFT.
        loras: expert name -> folder that PEFT saved a LoRA in.
        preset: a method for the gate, such as xlora, arrow, phatgoose or meteora.
        fit: how to set the gate's rows at once: arrow, average, phatgoose or uniform; see `molora.fit_gate`. The
            presets arrow and lorahub need no more than their own.
        data: for average and phatgoose.
        settings: fields of MoLoraConfig that differ, such as gate.

    Raises:
        AdapterError: a folder that is no ordinary LoRA, or does not fit the base.
        ConfigError: settings that the LoRAs decide (num_experts, r, targets), or that mean nothing.
    """
    if not loras:
        raise ConfigError("compose needs at least one LoRA: {name: folder}.")
    ours = {"num_experts", "r", "target_modules", "expert_names", "expert_specs", "share_A"}
    if decided := sorted(ours & set(settings)):
        raise ConfigError(f"compose: {', '.join(decided)} follow from the LoRAs; leave them out.")
    if fit is not None and fit not in METHODS:
        raise ConfigError(f"fit={fit!r} is not one of {', '.join(METHODS)}.{did_you_mean(fit, METHODS)}")
    folders = {name: read_lora(folder) for name, folder in loras.items()}
    modules = {name for name, _ in base_modules(base)}
    for folder in folders.values():
        foreign = sorted(set(folder.factors) - modules)
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise AdapterError(
                f"{folder.path} does not fit this base: it has no module {foreign[0]!r}{more}.",
                hint="use the base the LoRA was trained on.",
            )
    targets = sorted({key for folder in folders.values() for key in folder.factors})
    kinds = {folder.task_type for folder in folders.values()}
    given = {
        "task_type": kinds.pop() if len(kinds) == 1 else None,
        **settings,
        "num_experts": len(loras),
        "expert_names": list(loras),
        "target_modules": short_names(base, targets),
        "frozen_experts": list(loras),
        "free_rows": list(loras),
        "r": 1,
        "expert_specs": {name: folder.spec for name, folder in folders.items()},
    }
    if preset is not None:
        given = preset_settings(preset, given)
        chosen = given["gate"].get("top_k") if isinstance(given["gate"], Mapping) else None
        if isinstance(chosen, int) and "gate" not in settings:  # a method that picks 3 of 2 LoRAs picks both
            given["gate"] = {**given["gate"], "top_k": min(chosen, len(loras))}
    model = get_peft_model(base, MoLoraConfig(**given))
    for name, path in loras.items():
        import_lora(model, path, expert=name)
    if fit is not None:
        fit_gate(model, fit, data)
    return model

"""Optimiser groups (experts, gates, heads) and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from molora.config import StageConfig, TrainConfig
from molora.errors import ConfigError
from molora.experts.stack import Stack
from molora.gates.gate import Gate

ROLES = ("experts_A", "experts_B", "experts_prompts", "gates", "heads")


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter under exactly one of ROLES, by the module that owns it.

    `experts_A` and `experts_B` are an ExpertBank's factors (plain LoRA targets are banks of one; tasks' cores count as A),
    `experts_prompts` are their virtual tokens, `gates` is all that a Gate holds, and everything else that trains
    (`modules_to_save`) is a head.
    """
    roles: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    seen: set[nn.Parameter] = set()
    inside = {module for gate in model.modules() if isinstance(gate, Gate) for module in gate.modules()}
    for module in model.modules():
        role = f"experts_{module.role}" if isinstance(module, Stack) else "heads"
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                roles["gates" if module in inside else role].append(parameter)
    return roles


def parameter_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups, one per role in use, each with `name`, `lr` and `weight_decay`.

    Raises ConfigError when nothing is trainable. Reference for the ratio on B: LoRA+, arXiv:2402.12354.
    """
    lr = settings.lr
    rates = {
        "experts_A": lr,
        "experts_B": lr * settings.lora_plus_ratio,
        "experts_prompts": lr if settings.prompt_lr is None else settings.prompt_lr,
        "gates": lr if settings.gate_lr is None else settings.gate_lr,
        "heads": lr if settings.head_lr is None else settings.head_lr,
    }
    decays = dict.fromkeys(ROLES, settings.weight_decay) | {"gates": settings.gate_weight_decay}
    groups = [
        {"name": role, "params": parameters, "lr": rates[role], "weight_decay": decays[role]}
        for role, parameters in parameters_by_role(model).items()
        if parameters
    ]
    if not groups:
        raise ConfigError(
            "nothing to train: every parameter of the model is frozen.", hint="unfreeze an expert."
        )
    return groups


def build_optimizer(model: nn.Module, settings: TrainConfig, *, fused: bool = False) -> AdamW:
    """AdamW over `parameter_groups`. `fused` is several times faster on many small tensors."""
    return AdamW(parameter_groups(model, settings), fused=fused)


def warmup_steps(warmup: float | int, total: int) -> int:
    """Steps of warm-up: an int counts steps, a float is a fraction of `total`."""
    return warmup if isinstance(warmup, int) else math.ceil(warmup * total)


# What the learning rate is multiplied by after a share of the steps that follow the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}


def lr_factor(step: int, *, schedule: str, warmup: int, total: int) -> float:
    """What the learning rate is multiplied by at optimiser step `step` (0 = the first).

    Rises linearly to 1 over `warmup` steps, then follows the schedule, reaching 0 after the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return SCHEDULES[schedule](min(1.0, progress))


def build_scheduler(
    optimizer: AdamW, settings: TrainConfig, total: int, rate: Callable[[int], float] | None = None
) -> LambdaLR:
    """The schedule of `settings` over `total` optimiser steps, for all groups alike; `rate` multiplies that of experts."""
    warmup = warmup_steps(settings.warmup, total)

    def factor(step: int) -> float:
        return lr_factor(step, schedule=settings.schedule, warmup=warmup, total=total)

    def of_experts(step: int) -> float:
        return factor(step) * (1.0 if rate is None else rate(step))

    names = [group["name"] for group in optimizer.param_groups]
    return LambdaLR(optimizer, [of_experts if name.startswith("experts") else factor for name in names])


def trained_parts(stages: Sequence[StageConfig], step: int) -> frozenset[str]:
    """Which of `experts`, `gates`, `heads` learn at optimiser step `step` (0 = the first).

    Stages follow one another; the last one goes on until the end. No stages: everything, always.
    """
    for stage in stages[:-1]:
        if step < (stage.steps or 0):
            return frozenset(stage.train)
        step -= stage.steps or 0
    return frozenset(stages[-1].train if stages else ("experts", "gates", "heads"))

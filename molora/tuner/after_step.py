"""What kinds of experts do after a step of the optimiser (AdaLoRA's budget): the one place that training calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from molora.experts.kinds.kind import Kind, Step
from molora.forward.mount import Mount, MountPoint


def after_step(
    model: nn.Module,
    step: int | None = None,
    total_steps: int | None = None,
    loss: Callable[[], Tensor] | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Let the active adapters' experts look at weights and gradients, between `optimizer.step()` and `zero_grad()`.

    molora's own training calls it, and so does a Trainer with `molora.hf.MoLoraTrainerMixin`. A loop of your own has to for
    the kinds `adalora`, `sparse`, `relora` and `cola`; for the others it does nothing.

    Args:
        model: with its gradients still there.
        step: the number of the step just made, from 1; None: one more than the last.
        total_steps: how many there will be; None: as the kind's settings say.
        loss: computes the loss of the last batch again, which `sparse` with `scores: grasp` asks for.
        optimizer: whose step it was, which `relora` and `cola` ask for.

    Raises:
        ConfigError: the kind needs to know how many steps there are, or the loss, or the optimiser.
    """
    for kind, mounts in _kinds(model, active=True).values():
        kind.after_step({mount.key: mount.bank for mount in mounts}, Step(step, total_steps, loss, optimizer))


def looks_at_steps(model: nn.Module) -> bool:
    """Whether `after_step` does anything here."""
    return any(type(kind).after_step is not Kind.after_step for kind, _ in _kinds(model).values())


def expert_rate(model: nn.Module, step: int) -> float:
    """What the active adapters' kinds multiply the experts' learning rate by at a step (0 = the first)."""
    return min((kind.rate(step) for kind, _ in _kinds(model, active=True).values()), default=1.0)


def withhold(model: nn.Module, half: int) -> None:
    """Drop the gradients of what experts do not learn on this half of the data: 1 is that of their kind's `upper` stacks."""
    for kind, mounts in _kinds(model, active=True).values():
        stacks = [(name, stack) for mount in mounts for name, stack in mount.bank.named_stacks().items()]
        for name, stack in stacks if kind.upper else ():
            if (name in kind.upper) != (half == 1):
                for block in stack.blocks:
                    block.grad = None


def kind_states(model: nn.Module) -> dict[str, Any]:
    """By adapter, what its kind of experts has to remember beside its tensors to go on training; plain data."""
    found = {adapter: kind.state() for adapter, (kind, _) in _kinds(model).items()}
    return {adapter: state for adapter, state in found.items() if state}


def restore_kinds(model: nn.Module, states: Mapping[str, Any]) -> None:
    """Go on from `kind_states`."""
    for adapter, (kind, _) in _kinds(model).items():
        if adapter in states:
            kind.restore(states[adapter])


def _kinds(model: nn.Module, *, active: bool = False) -> dict[str, tuple[Kind, list[Mount]]]:
    """By adapter, its kind and the mounts of its experts."""
    found: dict[str, tuple[Kind, list[Mount]]] = {}
    for point in (module for module in model.modules() if isinstance(module, MountPoint)):
        for adapter, mount in point.mounts.items():
            if not mount.plain and (not active or adapter in point.active_adapters):
                found.setdefault(adapter, (mount.bank.kind, []))[1].append(mount)
    return found

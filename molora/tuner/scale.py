"""How strongly an adapter acts: the scalings of its experts times a factor, in one layer or in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from molora.errors import ConfigError
from molora.forward.mount import PLAIN, Mount, MountPoint
from molora.tuner.parts import scaling_of
from molora.tuner.placement import experts_at


def configured_scalings(mount: Mount) -> list[float]:
    """What the config says of each expert of a layer."""
    names = [PLAIN] if mount.plain else experts_at(mount.config, mount.key)
    return [scaling_of(mount.config, name, mount.key) for name in names]


def set_scalings(mount: Mount, scalings: list[float]) -> None:
    """Give a layer's experts these scalings, in expert order."""
    mount.bank.rescale(scalings)
    mount.inputs.plans.clear()  # operands that were kept have the old ones


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Let the active adapters act `multiplier` times as strongly inside; PEFT's function of that name, for mixtures.

    Raises:
        ConfigError: the model has no molora adapter, or the multiplier is no number.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise ConfigError(f"multiplier={multiplier!r} is not a number.")
    points = [module for module in model.modules() if isinstance(module, MountPoint)]
    if not points:
        hint = "build one with peft.get_peft_model(base, MoLoraConfig(...))."
        raise ConfigError(f"{type(model).__name__} has no molora adapter.", hint=hint)
    mounts = [p.mounts[name] for p in points for name in p.active_adapters if name in p.mounts]
    before = [mount.bank.scalings for mount in mounts]
    try:
        for mount, scalings in zip(mounts, before, strict=True):
            set_scalings(mount, [scaling * multiplier for scaling in scalings])
        yield
    finally:
        for mount, scalings in zip(mounts, before, strict=True):
            set_scalings(mount, [*scalings])

"""Names of adapters: they become folder names, and keys of modules that PyTorch keeps by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from molora.config.names import check_name
from molora.errors import ConfigError

_MODULES = nn.ModuleDict()


def only_one(active: Sequence[str]) -> str:
    """The one adapter that is active; ConfigError where there are several, or none."""
    if len(active) != 1:
        raise ConfigError(f"{len(active)} adapters are active; name one with adapter_name=.")
    return active[0]


def check_adapter_name(name: object) -> None:
    """Raise ConfigError unless an adapter may have this name.

    The rule is that of all names (`check_name`), but without dots, and without the names that nn.ModuleDict
    has itself, such as `keys` or `training`.
    """
    text = check_name(name, "adapter")
    if "." in text or hasattr(_MODULES, text):
        problem = "contains a dot" if "." in text else "is the name of something in every PyTorch module"
        raise ConfigError(f"adapter name {text!r} {problem}.", hint="use another name, such as 'default'")

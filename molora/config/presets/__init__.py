"""Published methods as adapter settings: one function per method, with the release it follows. Pure data, no torch.

`token_dense.py`, `token_chosen.py` and `token_adaptive.py` have the gates that read tokens, `sample_gates.py` those that
read a sample, its task or nothing, `over_loras.py` those over experts that exist already. A docstring says what a method
is and how its numbers were converted; `follows` above it names the release and every point where the preset is not it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from molora.config.gate_rules import without_idle
from molora.config.presets import over_loras, sample_gates, token_adaptive, token_chosen, token_dense
from molora.config.presets.release import RELEASES
from molora.config.suggest import options
from molora.errors import ConfigError
from molora.registry import Registry

PRESETS: Registry[Callable[[], dict[str, Any]]] = Registry("preset")
for _module in (token_dense, token_chosen, token_adaptive, sample_gates, over_loras):
    for _method in _module.METHODS:
        PRESETS.add(_method.__name__, _method)


def preset_settings(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings with some replaced; a `gate` map without `kind` replaces single fields of the gate.

    Fields of the method's gate that no longer act are left out: replacing `select` also drops its `top_p`.

    Raises:
        ConfigError: no preset of that name; the message lists those that exist.
    """
    key = name.replace("-", "_")
    if key not in PRESETS:
        raise ConfigError(f"no preset {name!r}.{options(key, PRESETS, 'Presets')}")
    settings = PRESETS[key]()
    gate = overrides.get("gate")
    if isinstance(gate, Mapping) and "kind" not in gate:
        overrides = {**overrides, "gate": without_idle({**settings["gate"], **gate}, gate)}
    return {**settings, **overrides}


def summary(name: str) -> str:
    """What a preset is, in the first line of its description, and whose."""
    return f"{(inspect.getdoc(PRESETS[name]) or '').splitlines()[0]} {RELEASES[name].paper}"

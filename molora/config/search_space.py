"""What a search tries: for dotted keys of a recipe, a list of choices or a range of numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molora.config.load import load_recipe, read_text
from molora.config.losses import AUX_LOSSES
from molora.config.presets.target_patterns import ATTENTION, FEED_FORWARD
from molora.config.run import RunConfig
from molora.config.strict_yaml import parse
from molora.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `log`: as many below their geometric mean as above."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, list[Any] | Range]


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The recipe with other values at dotted keys; ConfigError where they do not make one."""
    plain = config.model_dump(mode="json")
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        here = plain
        for section in sections:
            here = here.get(section) if isinstance(here, dict) else None  # type: ignore[assignment]
        if not isinstance(here, dict) or key not in here:
            raise ConfigError(
                f"the search names {dotted!r}, which the recipe does not have.",
                hint="keys are dotted, such as adapter.r or train.lr; `molora recipes keys` lists them.",
            )
        here[key] = copy.deepcopy(value)
    return load_recipe(plain)


def own_values(config: RunConfig, space: Space) -> dict[str, Any]:
    """What the recipe itself has at the keys of a space."""
    found = {}
    for dotted in space:
        here: Any = config.model_dump(mode="json")
        for key in dotted.split("."):
            here = here[key]
        found[dotted] = here
    return found


def default_space(config: RunConfig) -> dict[str, list[Any] | Range]:
    """Smaller and larger ranks, rates and numbers of experts than the recipe's, other targets, other gates.

    The recipe's own value is the first choice; choices that make no recipe are left out, and so are keys with one choice.
    """
    adapter, lr = config.adapter, config.train.lr
    gate = config.model_dump(mode="json")["adapter"]["gate"]
    space: dict[str, list[Any]] = {}
    if isinstance(adapter.r, int) and adapter.from_loras is None:
        space["adapter.r"] = [adapter.r, *(r for r in (adapter.r // 4, adapter.r // 2, 2 * adapter.r) if r)]
        if not adapter.ffn_targets:
            space["adapter.target_modules"] = [adapter.target_modules, ATTENTION, FEED_FORWARD]
    learned = adapter.gate.score != "none"
    if (
        learned
        and isinstance(adapter.num_experts, int)
        and adapter.expert_names is None
        and adapter.tasks is None
    ):
        n, by_task = adapter.num_experts, any(AUX_LOSSES[name].by_task for name in adapter.aux_losses)
        least = len(config.data.tasks) if by_task else 2  # then each task has an expert of its own
        space["adapter.num_experts"] = [n, *(m for m in (n // 2, 2 * n) if m >= least)]
    if adapter.gate.scope in ("token", "sequence"):
        others = [{"kind": kind, "share": "group"} for kind in ("sequence", "soft", "top_k")]
        space["adapter.gate"] = [gate, *others]
    tried = {key: _that_fit(config, key, choices) for key, choices in space.items()}
    found: dict[str, list[Any] | Range] = {key: choices for key, choices in tried.items() if len(choices) > 1}
    return {**found, "train.lr": Range(lr / 4, lr * 4, log=True)}


def _that_fit(config: RunConfig, key: str, choices: list[Any]) -> list[Any]:
    """The choices that make a recipe, each once."""
    found: list[Any] = []
    seen: list[Any] = []
    for choice in choices:
        try:
            made = own_values(with_values(config, {key: choice}), {key: []})[key]
        except ConfigError:
            continue
        if made not in seen:
            seen.append(made)
            found.append(choice)
    return found


def read_space(path: Path) -> dict[str, list[Any] | Range]:
    """A space from a YAML file; ConfigError says what a key's value may be."""
    data = parse(read_text(path), str(path)).data
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{path} is no search: it must be a map from dotted keys to choices or ranges.")
    return {str(key): _choices(path, str(key), value) for key, value in data.items()}


def _choices(path: Path, key: str, value: Any) -> list[Any] | Range:
    if isinstance(value, list) and value:
        return value
    numbers = isinstance(value, dict) and {"low", "high"} <= {*value} <= {"low", "high", "log"}
    if numbers and all(isinstance(value[end], (int, float)) for end in ("low", "high")):
        made = Range(float(value["low"]), float(value["high"]), bool(value.get("log", False)))
        if made.low < made.high and (made.low > 0 or not made.log):
            return made
    raise ConfigError(
        f"{path}: {key} is {value!r}; allowed: a list of choices, or {{low: 1.0e-4, high: 1.0e-2, log: true}}.",
    )


def as_plain(space: Space) -> dict[str, Any]:
    """A space as plain data."""
    return {key: asdict(choices) if isinstance(choices, Range) else choices for key, choices in space.items()}

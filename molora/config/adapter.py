"""The `adapter` section: the mixture of experts, its gate and its auxiliary losses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Self

from pydantic import Field, model_validator

from molora.config.choices import GATE_KIND_KEYS, GATE_KINDS
from molora.config.gate import GateSettings
from molora.config.gate_rules import gate_problems
from molora.config.loss_rules import AuxLosses
from molora.config.mixture import Mixture
from molora.config.mixture_rules import mixture_problems, pattern_problems, rank_problems
from molora.config.presets import preset_settings
from molora.config.router import RouterSettings, router_problems
from molora.config.section import (
    ExpertName,
    Positive,
    Problem,
    Section,
    TaskName,
    expand_shorthand,
    refuse,
    without_default,
)
from molora.config.suggest import did_you_mean, options
from molora.errors import ConfigError


class GateSection(Section, GateSettings):
    """Who decides the experts' weights. `kind:` is shorthand for the long fields kept here."""

    @model_validator(mode="before")
    @classmethod
    def _expand_kind(cls, data: Any) -> Any:
        data = expand_shorthand(data, "kind")
        if not isinstance(data, dict) or "kind" not in data:
            return data
        given = dict(data)
        kind = given.pop("kind")
        if not isinstance(kind, str) or kind not in GATE_KINDS:
            refuse([(("kind",), f"{kind!r} is not a kind of gate.{options(kind, GATE_KINDS)}")])
        legal = GATE_KIND_KEYS[kind]
        text, settings = f"not a setting of gate kind {kind!r}.", ", ".join(("kind", *legal))
        strange = [key for key in given if key not in legal]
        refuse(((key,), f"{text}{did_you_mean(key, legal)} Its settings: {settings}.") for key in strange)
        return GATE_KINDS[kind] | given

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(((field,), message) for field, message in gate_problems(self))
        return self


class RouterSection(Section, RouterSettings):
    """Who names the task of a prompt that comes without an id. `router: kind` is short for `router: {kind: kind}`."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return expand_shorthand(data, "kind")

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse([((field,), message) for field, message in router_problems(self)])
        return self


class AdapterConfig(Section, Mixture):
    """The mixture: how many experts of which rank sit on which layers, and how they are mixed."""

    gate: GateSection = Field(default_factory=GateSection)
    """Who decides the experts' weights."""
    router: RouterSection | None = None
    """Who names the task of a prompt that comes without an id."""
    target_modules: str | list[str] = "all-linear"
    """The linears that get experts: names, a regular expression, or `all-linear`."""
    tasks: dict[TaskName, list[ExpertName] | dict[ExpertName, Positive]] | None = None
    """Which experts serve which task: a list, or weights by name; null: a task gate gives each task its own."""
    from_loras: dict[ExpertName, str] | None = None
    """LoRA folders that become the experts, by name."""
    aux_losses: AuxLosses = Field(default_factory=dict)
    """Auxiliary losses: a coefficient, or `{coef: …, setting: …}`."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """`preset: name` stands for a method's settings. One expert alone has a default gate that picks one."""
        if not isinstance(data, dict):
            return data
        given = _of_loras(data) if isinstance(data.get("from_loras"), dict) else dict(data)
        if "preset" in given:
            name = str(given.pop("preset"))
            if "gate" in given:
                given["gate"] = expand_shorthand(given["gate"], "kind")
            try:
                given = preset_settings(name, given)
            except ConfigError as error:
                refuse([(("preset",), error.message)])
        return without_default(given, "gate", {"top_k": 1}) if given.get("num_experts") == 1 else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_loras is not None and not self.from_loras:
            refuse([(("from_loras",), "names no LoRA; give {name: folder}, or leave it out.")])
        if self.from_loras is not None and self.num_virtual_tokens is not None:
            text = "LoRAs that were trained without any would be others behind them; leave it out."
            refuse([(("num_virtual_tokens",), text)])
        problems = mixture_problems(self, self.gate), pattern_problems(self), rank_problems(self)
        refuse(chain(*problems, self._empty()))
        return self

    def _empty(self) -> Iterator[Problem]:
        for key, what in {"r": "rank", "num_experts": "number"}.items():
            if not getattr(self, key):
                yield (key,), f"is empty; give a {what}, such as 8."
        for key in ("target_modules", "plain_targets", "ffn_targets", "modules_to_save", "exclude_modules"):
            value = getattr(self, key)
            if value is not None and (not value or ("" in value and isinstance(value, list))):
                otherwise = "or all-linear" if key == "target_modules" else "or leave it out"
                yield (key,), f"is empty; name modules, such as [q_proj, v_proj], {otherwise}."


_LORAS_DECIDE = (
    "r", "rank_pattern", "target_modules", "lora_alpha", "use_rslora", "scaling", "kind", "share_A", "init",
)  # fmt: skip


def _of_loras(data: dict[str, Any]) -> dict[str, Any]:
    """Experts read from LoRA folders: their number and names follow; refuses what the LoRAs decide."""
    names = list(data["from_loras"])
    follow = {"num_experts": len(names), "expert_names": names}
    decided = [key for key, value in follow.items() if data.get(key, value) != value]
    if "expert_names" not in data:  # as written, not a resolved recipe, which has every field
        decided += [key for key in _LORAS_DECIDE if key in data]
    refuse(((key,), "is decided by the LoRAs in from_loras; leave it out.") for key in decided)
    return {**data, **follow}

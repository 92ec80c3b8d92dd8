"""The `adapter` section: the mixture of experts, its gate and its auxiliary losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from molora.config.choices import GATE_KIND_KEYS, GATE_KINDS
from molora.config.gate import GateSettings
from molora.config.gate_rules import gate_problems
from molora.config.loss_rules import aux_problems
from molora.config.mixture import Mixture
from molora.config.mixture_rules import mixture_problems, rank_problems
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
from molora.config.suggest import did_you_mean
from molora.errors import ConfigError


class GateSection(Section, GateSettings):
    """Who decides the experts' weights. `kind:` is shorthand for the long fields kept here."""

    @model_validator(mode="before")
    @classmethod
    def _expand_kind(cls, data: Any) -> Any:
        data = expand_shorthand(data, "kind")
        if not isinstance(data, dict):
            return data
        if "kind" not in data:
            return data
        given = {key: value for key, value in data.items() if key != "kind"}
        kind = data["kind"]
        if kind not in GATE_KINDS:
            hint = did_you_mean(kind, GATE_KINDS)
            text = f"{kind!r} is not a kind of gate.{hint} Allowed: {', '.join(GATE_KINDS)}."
            refuse([(("kind",), text)])
        legal = GATE_KIND_KEYS[kind]
        rest = f"Its settings: {', '.join(('kind', *legal))}."
        refuse(
            [
                ((key,), f"not a setting of gate kind {kind!r}.{did_you_mean(key, legal)} {rest}")
                for key in given
                if key not in legal
            ]
        )
        return GATE_KINDS[kind] | given

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse([((field,), message) for field, message in gate_problems(self)])
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
    router: RouterSection | None = None
    target_modules: str | list[str] = "all-linear"
    tasks: dict[TaskName, list[ExpertName] | dict[ExpertName, Positive]] | None = None
    from_loras: dict[ExpertName, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """`preset: name` stands for a method's settings. One expert alone has a default gate that picks one."""
        if isinstance(data, dict) and isinstance(data.get("from_loras"), dict):
            data = _of_loras(data)
        if isinstance(data, dict) and "preset" in data:
            given = {key: value for key, value in data.items() if key != "preset"}
            if isinstance(given.get("gate"), str):
                given["gate"] = {"kind": given["gate"]}
            try:
                data = preset_settings(str(data["preset"]), given)
            except ConfigError as error:
                refuse([(("preset",), error.message)])
        if isinstance(data, dict) and data.get("num_experts") == 1:
            return without_default(data, "gate", {"top_k": 1})
        return data

    @field_validator("aux_losses", mode="before")
    @classmethod
    def _check_losses(cls, data: Any) -> Any:
        refuse([*aux_problems(data)] if isinstance(data, dict) else [])
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_loras is not None and not self.from_loras:
            refuse([(("from_loras",), "names no LoRA; give {name: folder}, or leave it out.")])
        refuse([*mixture_problems(self, self.gate), *rank_problems(self), *self._empty()])
        return self

    def _empty(self) -> Iterator[Problem]:
        if not self.r:
            yield ("r",), "is empty; give a rank, such as 8."
        if not self.num_experts:
            yield ("num_experts",), "is empty; give a number, such as 8."
        for key in ("target_modules", "plain_targets", "ffn_targets", "modules_to_save", "exclude_modules"):
            value = getattr(self, key)
            if value is not None and (not value or ("" in value and isinstance(value, list))):
                otherwise = "or all-linear" if key == "target_modules" else "or leave it out"
                yield (key,), f"is empty; name modules, such as [q_proj, v_proj], {otherwise}."


_LORAS_DECIDE = (
    "r",
    "rank_pattern",
    "target_modules",
    "lora_alpha",
    "use_rslora",
    "scaling",
    "kind",
    "share_A",
    "init",
)


def _of_loras(data: dict[str, Any]) -> dict[str, Any]:
    """Experts read from LoRA folders: their number and names follow; refuses what the LoRAs decide."""
    names = list(data["from_loras"])
    follow = {"num_experts": len(names), "expert_names": names}
    decided = [key for key, value in follow.items() if data.get(key, value) != value]
    if "expert_names" not in data:  # as written, not a resolved recipe, which has every field
        decided += [key for key in _LORAS_DECIDE if key in data]
    refuse([((key,), "is decided by the LoRAs in from_loras; leave it out.") for key in decided])
    return {**data, **follow}

"""The JSON schema of recipes, made from the one declaration: for editors that complete and check YAML."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from molora.config.adapter import AdapterConfig
from molora.config.choices import GATE_CHOICES, GATE_KINDS, KINDS, ROUTERS
from molora.config.continual import STRATEGIES
from molora.config.federated import AGGREGATORS
from molora.config.gate import GateSettings
from molora.config.grow import GrowConfig
from molora.config.losses import AUX_LOSSES
from molora.config.mixture import Mixture
from molora.config.presets import PRESETS
from molora.config.router import RouterSettings
from molora.config.run import RunConfig

Schema = dict[str, Any]


def schema(kind: str = "recipe") -> Schema:
    """The schema of what `train`, `continual` and `federate` read ("recipe"), or of what `add-expert` does ("growth").

    It knows names, types, bounds and choices, shorthands included. What goes with what is `molora validate`'s to say.
    """
    made = (RunConfig if kind == "recipe" else GrowConfig).model_json_schema(mode="validation")
    parts: dict[str, Schema] = made["$defs"]
    _describe(parts, "AdapterConfig", Mixture)
    _describe(parts, "GateSection", GateSettings)
    _describe(parts, "RouterSection", RouterSettings)
    if "AdapterConfig" in parts:
        adapter = parts["AdapterConfig"]["properties"]
        adapter["preset"] = {"enum": sorted(PRESETS), "description": "a published method's settings."}
        adapter["kind"]["enum"] = sorted(KINDS)
        for name in ("gate", "router"):
            adapter[name]["description"] = _doc(AdapterConfig, name)
    if "GateSection" in parts:
        gate = parts["GateSection"]["properties"]
        gate["kind"] = {"enum": sorted(GATE_KINDS), "description": "shorthand for the long fields."}
        for name, allowed in GATE_CHOICES.items():
            options: list[Any] = sorted(allowed)
            gate[name] = {
                **_without(gate[name], "type", "anyOf"),
                "anyOf": [{"enum": options}, {"type": "null"}],
            }
    _set_enum(parts, "RouterSection", "kind", ROUTERS)
    _set_enum(parts, "StrategyConfig", "kind", STRATEGIES)
    _set_enum(parts, "FederatedConfig", "aggregate", AGGREGATORS)
    _losses(made)
    for name, key in (
        ("GateSection", "kind"),
        ("RouterSection", "kind"),
        ("StrategyConfig", "kind"),
        ("BaseConfig", "model"),
    ):
        _allow_text(parts, name, key)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"molora {kind}",
        **_without(made, "title"),
    }


def _describe(parts: dict[str, Schema], name: str, declared: type) -> None:
    for field in fields(declared):
        if name in parts and field.name in parts[name]["properties"]:
            parts[name]["properties"][field.name]["description"] = _doc(declared, field.name)


def _doc(declared: type, name: str) -> str:
    field = declared.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return str(field.metadata.get("doc", ""))


def _set_enum(parts: dict[str, Schema], section: str, key: str, names: Any) -> None:
    if section in parts:
        parts[section]["properties"][key]["enum"] = sorted(names)


def _allow_text(parts: dict[str, Schema], section: str, key: str) -> None:
    """`section: text` is short for `section: {key: text}`."""
    if section in parts:
        whole = parts[section]
        parts[section] = {"anyOf": [{"type": "string", **_only_enum(whole["properties"][key])}, whole]}


def _only_enum(field: Schema) -> Schema:
    return {"enum": field["enum"]} if "enum" in field else {}


def _losses(made: Schema) -> None:
    """Auxiliary losses by name: a coefficient, or one with settings."""
    for section in (made, *made["$defs"].values()):
        if "aux_losses" in section.get("properties", {}):
            one = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "object"}]}
            section["properties"]["aux_losses"] = {
                "description": section["properties"]["aux_losses"]["description"],
                "type": "object",
                "properties": dict.fromkeys(sorted(AUX_LOSSES), one),
                "additionalProperties": False,
            }


def _without(mapping: Schema, *keys: str) -> Schema:
    return {key: value for key, value in mapping.items() if key not in keys}

"""A recipe and the Python API mean the same: equal names, equal defaults, equal choices, equal refusals."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args

import pytest
from molora.tuner.gate_config import gate_from_kind

from molora import GateConfig, MoLoraConfig, losses
from molora.config import AdapterConfig, GateSection, load_recipe
from molora.config.choices import AUX_LOSSES, GATE_CHOICES, GATE_KINDS
from molora.errors import ConfigError
from molora.experts.init import INIT_KINDS
from molora.tuner.config import SCALINGS
from tests.config.recipes import small

# Where a recipe, which always trains, says more than the PEFT config, which also describes a saved adapter.
RECIPE_DEFAULTS = {"target_modules": "all-linear", "gate": GateSection()}


def defaults(config: type) -> dict[str, Any]:
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return {f.name: f.default for f in fields(config)} | made


def test_adapter_settings_have_the_same_defaults() -> None:
    ours = {
        name: field.get_default(call_default_factory=True)
        for name, field in AdapterConfig.model_fields.items()
        if name != "from_loras"  # of a recipe: molora.compose in Python
    }
    theirs = {name: value for name, value in defaults(MoLoraConfig).items() if name in ours}
    assert theirs.keys() == ours.keys()
    assert ours == theirs | RECIPE_DEFAULTS


def test_gate_settings_have_the_same_defaults() -> None:
    assert GateSection().model_dump() == defaults(GateConfig)
    assert MoLoraConfig(num_experts=4).gate == MoLoraConfig(num_experts=4, gate=asdict(GateConfig())).gate


def choices(section: type, name: str) -> set[str]:
    def literals(annotation: Any) -> list[Any]:
        inner = [value for option in get_args(annotation) for value in literals(option)]
        return [annotation] if isinstance(annotation, str) else inner

    found = set(literals(section.model_fields[name].annotation))  # type: ignore[attr-defined]
    return found or set(GATE_CHOICES[name])  # a plain string, which the shared rules check


def test_choices_are_the_same() -> None:
    assert {name: choices(GateSection, name) for name in GATE_CHOICES} == {
        k: set(v) for k, v in GATE_CHOICES.items()
    }
    assert choices(AdapterConfig, "init") == set(INIT_KINDS)
    assert choices(AdapterConfig, "scaling") == set(SCALINGS)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_kind_means_the_same_gate(kind: str) -> None:
    more = {"feature_dim": 5} if kind == "external" else {}
    recipe = small(adapter={"num_experts": 4, "gate": {"kind": kind, **more}})
    if kind == "external":
        recipe["features"] = {"encoder": "some/encoder", "num_clusters": 5}
    section = load_recipe(recipe).adapter.gate
    assert section.model_dump() == asdict(gate_from_kind(kind, **more))


def test_every_auxiliary_loss_is_a_function_with_those_settings() -> None:
    for name, settings in AUX_LOSSES.items():
        parameters = inspect.signature(getattr(losses, name)).parameters
        for setting, default in settings.items():
            if setting in ("mask", "factor"):  # what the function is called with
                continue
            given = parameters[setting].default
            if isinstance(default, tuple):
                assert given == default[0]
            else:
                assert given in (default, inspect.Parameter.empty)


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": {"kind": "top_k", "top_k": 5}},
        {"gate": {"kind": "top_k", "top_k": 1, "renorm": "sum"}},
        {"gate": {"kind": "soft", "share": "global"}},
        {"gate": {"kind": "soft", "renorm": "sum"}},
        {"gate": {"kind": "nothing"}},
        {"gate": {"kind": "task"}, "aux_losses": {"balance": 0.1}},
        {"aux_losses": {"balence": 0.1}},
        {"aux_losses": {"orthogonal": {"coefficient": 0.1, "norm": "l3"}}},
        {"expert_names": ["x", "y"]},
        {"expert_names": ["x", "y", "X", "z"]},
        {"expert_names": ["x", "y", "a/b", "z"]},
        {"tasks": {"copy": ["nobody"]}},
        {"r": 0},
        {"lora_alpha": -1.0},
        {"lora_dropout": 1.0},
        {"init": "zeros"},
        {"init_std": 0.0},
        {"init_gain": -1.0},
        {"num_experts": 0},
    ],
    ids=str,
)
def test_both_refuse_the_same(settings: dict[str, Any]) -> None:
    complete = {"num_experts": 4, **settings}
    with pytest.raises(ConfigError):
        load_recipe(small(adapter=complete))
    with pytest.raises(ConfigError):
        MoLoraConfig(target_modules="all-linear", **complete)

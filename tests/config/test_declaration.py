"""Gates and mixtures are declared once: recipes, Python, docstrings and refusals say the same."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, asdict, fields
from typing import Any

import pytest

from molora import GateConfig, MoLoraConfig, losses
from molora.config import AdapterConfig, GateSection, load_recipe
from molora.config.choices import GATE_CHOICES, GATE_KINDS
from molora.config.gate import GateSettings
from molora.config.gate_config import gate_from_kind
from molora.config.losses import AUX_LOSSES
from molora.config.mixture import Mixture, SavedMixture
from molora.config.setting import limits_of, settings_table, values_of
from molora.errors import ConfigError
from molora.experts.init import INIT_KINDS
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


def test_defaults_that_are_made_are_not_shared() -> None:
    first, second = AdapterConfig(), AdapterConfig()
    assert first.rank_pattern is not second.rank_pattern


def test_choices_are_the_same() -> None:
    assert set(GATE_CHOICES) <= {f.name for f in fields(GateSettings)}
    for name in set(GATE_CHOICES) - {"score"}:  # of a score the rules speak, beside the scope
        with pytest.raises(ValueError, match=r"'nothing'|Input should be"):
            GateSection.model_validate({name: "nothing"})
    assert limits_of(Mixture)["init"].choices == INIT_KINDS


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_kind_means_the_same_gate(kind: str) -> None:
    more = {"feature_dim": 5} if kind == "external" else {}
    recipe = small(adapter={"num_experts": 4, "gate": {"kind": kind, **more}})
    if kind == "external":
        recipe["features"] = {"encoder": "some/encoder", "num_clusters": 5}
    section = load_recipe(recipe).adapter.gate
    assert section.model_dump() == asdict(gate_from_kind(kind, **more))


def test_every_auxiliary_loss_is_a_function_with_those_settings() -> None:
    for name, spec in AUX_LOSSES.items():
        parameters = inspect.signature(getattr(losses, name)).parameters
        for setting, default in spec.settings.items():
            if setting in ("mask", "factor"):  # what the function is called with
                continue
            given = parameters[setting].default
            if isinstance(default, tuple):
                assert given == default[0]
            else:
                assert given in (default, inspect.Parameter.empty)
        assert not spec.of_gate or spec.load().__name__ == name


REFUSED = [
    {"gate": {"kind": "top_k", "top_k": 5}},
    {"gate": {"kind": "top_k", "top_k": 1, "renorm": "sum"}},
    {"gate": {"kind": "soft", "share": "global"}},
    {"gate": {"kind": "soft", "renorm": "sum"}},
    {"gate": {"kind": "nothing"}},
    {"gate": {"temperature": 0.0}},
    {"gate": {"hidden": 0}},
    {"gate": {"threshold_learned": True}},
    {"gate": {"norm": "layer"}},
    {"gate": {"start": 1.0}},
    {"gate": {"kind": "task"}, "aux_losses": {"balance": 0.1}},
    {"aux_losses": {"balence": 0.1}},
    {"aux_losses": {"orthogonal": {"coefficient": 0.1, "norm": "l3"}}},
    {"expert_names": ["x", "y"]},
    {"expert_names": ["x", "y", "X", "z"]},
    {"expert_names": ["x", "y", "a/b", "z"]},
    {"tasks": {"copy": ["nobody"]}},
    {"tasks": {"copy": []}},
    {"tasks": {"copy": ["expert_1", "expert_1"]}},
    {"frozen_experts": ["nobody"]},
    {"always_on": {"nobody": 1.0}},
    {"r": 0},
    {"r": [4, 0]},
    {"r": {".": 4}, "rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"q_proj": 0}},
    {"alpha_pattern": {"q_proj": -1.0}},
    {"lora_alpha": -1.0},
    {"lora_alpha": float("nan")},
    {"lora_dropout": 1.0},
    {"init": "zeros"},
    {"init_std": 0.0},
    {"gate": {"init": "zeros"}},
    {"gate": {"init_std": "wide"}},
    {"init_gain": -1.0},
    {"scaling": "beta"},
    {"use_rslora": True, "scaling": "alpha"},
    {"num_experts": 0},
    {"num_experts": []},
    {"combine": "sums"},
    {"combine": "factors"},
]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_both_refuse_the_same(settings: dict[str, Any]) -> None:
    complete = {"num_experts": 4, **settings}
    with pytest.raises(ConfigError):
        load_recipe(small(adapter=complete))
    with pytest.raises(ConfigError):
        MoLoraConfig(target_modules="all-linear", **complete)


def test_both_say_the_same_of_what_does_not_go_together() -> None:
    for settings in (
        {"expert_names": ["x", "y", "X", "z"]},
        {"tasks": {"copy": ["nobody"]}},
        {"use_rslora": True, "scaling": "alpha"},
        {"combine": "factors"},
        {"aux_losses": {"task_label": 0.1}, "gate": {"kind": "constant"}},
    ):
        with pytest.raises(ConfigError) as python:
            MoLoraConfig(num_experts=4, **settings)
        with pytest.raises(ConfigError) as recipe:
            load_recipe(small(adapter={"num_experts": 4, **settings}))
        assert f"adapter.{python.value.message}" in recipe.value.message


@pytest.mark.parametrize(
    ("declared", "public"),
    [(GateSettings, GateConfig), (SavedMixture, MoLoraConfig)],
    ids=lambda c: c.__name__,
)
def test_every_setting_is_a_documented_keyword(declared: type, public: type) -> None:
    keywords = inspect.signature(public).parameters
    for field in fields(declared):
        assert field.name in keywords
        assert field.metadata["doc"].rstrip().endswith("."), field.name
        assert f"    {field.name}: {field.metadata['doc']}" in (public.__doc__ or "")
        assert f"| `{field.name}` |" in settings_table(declared)
    assert (public.__doc__ or "").index("Args:") < (public.__doc__ or "").index("Raises:")


def test_what_acts_only_with_others_names_fields_and_their_values() -> None:
    names = values_of(GateSettings())
    for field in fields(GateSettings):
        for other, allowed in field.metadata["acts_with"].items():
            assert other in names
            assert set(allowed) <= set(GATE_CHOICES[other])


def test_limits_are_read_from_the_annotations() -> None:
    with pytest.raises(ConfigError, match=r"lora_dropout=1.0: must be in \[0, 1\)\."):
        MoLoraConfig(lora_dropout=1.0)
    with pytest.raises(ConfigError, match=r"gate\.init_std=-1: must not be negative\."):
        GateConfig(init_std=-1)
    with pytest.raises(ConfigError, match=r"gate\.temperature=inf: must be a finite number\."):
        GateConfig(temperature=float("inf"))
    with pytest.raises(ConfigError, match=r"lora_alpha='16': must be a number, not '16'\."):
        MoLoraConfig(lora_alpha="16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scaling='beta': 'beta' is not a number or one of alpha_over_r"):
        MoLoraConfig(scaling="beta")
    assert MoLoraConfig(lora_alpha=1, scaling=2, num_experts=[1, 2]).num_experts == 2

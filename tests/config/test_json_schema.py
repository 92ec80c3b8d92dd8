"""The JSON schema takes every recipe that molora takes, and finds what an editor should underline."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from molora.config.json_schema import schema
from molora.config.presets import PRESETS
from tests.cli.conftest import Cli
from tests.cli.conftest import cli as cli
from tests.config.recipes import RECIPES, small

FILES = sorted(RECIPES.glob("*.yaml"))


def kind_of(recipe: dict[str, Any]) -> str:
    return "growth" if "task" in recipe else "recipe"


@pytest.fixture(scope="module")
def validators() -> dict[str, Draft202012Validator]:
    made = {kind: schema(kind) for kind in ("recipe", "growth")}
    for found in made.values():
        Draft202012Validator.check_schema(found)
    return {kind: Draft202012Validator(found) for kind, found in made.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path, validators: dict[str, Draft202012Validator]) -> None:
    recipe = yaml.safe_load(file.read_text())
    assert [error.message for error in validators[kind_of(recipe)].iter_errors(recipe)] == []


def test_presets_and_shorthands_are_valid(validators: dict[str, Draft202012Validator]) -> None:
    for name in PRESETS:
        assert validators["recipe"].is_valid(small(adapter={"preset": name})), name
    losses = {"balance": 0.1, "z": {"coefficient": 1}}
    for adapter in (
        {"gate": "task"},
        {"router": "ridge"},
        {"aux_losses": losses},
        {"gate": {"top_k": [1, 2]}},
    ):
        assert validators["recipe"].is_valid(small(adapter=adapter)), adapter
    assert validators["recipe"].is_valid(small(continual={"strategy": "o_lora"}))


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"num_expert": 4}},
        {"adapter": {"gate": "taks"}},
        {"adapter": {"gate": {"select": "topk"}}},
        {"adapter": {"preset": "mixlra"}},
        {"adapter": {"r": 0}},
        {"adapter": {"aux_losses": {"balence": 1}}},
        {"train": {"max_steps": "ten"}},
        {"train": {"schedule": "cosin"}},
        {"data": {"tasks": {"a": {"source": "jsonnl"}}}},
        {"continual": {"strategy": "olora"}},
        {"bse": "x"},
    ],
    ids=str,
)
def test_slips_are_found(sections: dict[str, Any], validators: dict[str, Draft202012Validator]) -> None:
    assert not validators["recipe"].is_valid(small(**sections))


def test_settings_say_what_they_mean(validators: dict[str, Draft202012Validator]) -> None:
    parts = schema()["$defs"]
    assert (
        parts["AdapterConfig"]["properties"]["lora_dropout"]["description"]
        == "dropout on the experts' input."
    )
    for kind in ("recipe", "growth"):
        made = schema(kind)
        for section in (
            made,
            *(whole for part in made["$defs"].values() for whole in part.get("anyOf", [part])),
        ):
            for name, field in section.get("properties", {}).items():
                assert field.get("description"), name
    assert copy.deepcopy(schema()) == schema()


def test_the_verb_prints_it(cli: Cli) -> None:
    for kind in ("recipe", "growth"):
        result = cli("schema", kind)
        assert result.code == 0 and json.loads(result.out) == json.loads(json.dumps(schema(kind)))
    assert cli("schema", "recipes").code == 2

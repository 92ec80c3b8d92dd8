"""`molora kinds`: every kind with its paper, and settings that can be pasted into a recipe."""

from __future__ import annotations

import pytest
import yaml

from molora.config.choices import KINDS
from tests.cli.conftest import Cli


def test_list_names_every_kind_and_what_it_trains(cli: Cli) -> None:
    lines = cli("kinds", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS)
    assert all(KINDS[line.split()[0]].about.trains in line for line in lines)


@pytest.mark.parametrize("name", KINDS)
def test_show_prints_paper_use_and_an_adapter_section(name: str, cli: Cli) -> None:
    shown, about = cli("kinds", "show", name).out, KINDS[name].about
    assert all(f"{text}." in shown for text in about)
    adapter = yaml.safe_load(shown)["adapter"]
    assert adapter == {"kind": name} | (
        {"kind_settings": KINDS[name].settings} if KINDS[name].settings else {}
    )


def test_an_unknown_kind_names_the_nearest(cli: Cli) -> None:
    result = cli("kinds", "show", "veera")
    assert result.code == 2 and "Did you mean 'vera'?" in result.err


def test_what_kinds_go_with_is_what_recipes_may_say(cli):
    rows = {line.split("|")[1].strip(): line for line in cli("kinds", "fits").out.splitlines()}
    yes = {name: rows[f"`{name}`"].split("|")[2:-1] for name in ("lora", "dora", "sparse")}
    assert {cell.strip() for cell in yes["lora"]} == {"yes"}
    assert [cell.strip() for cell in yes["dora"]] == ["no"] * 5 + ["yes", "yes", "yes"]
    assert yes["sparse"][-1].strip() == "no"  # `federated_problems` says why

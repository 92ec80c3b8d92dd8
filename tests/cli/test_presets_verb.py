"""`molora presets show`: release, differences and training stand above what can be pasted into a recipe."""

from __future__ import annotations

import re

import pytest
import yaml

from molora.config.presets import PRESETS, RELEASES
from tests.cli.conftest import Cli


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_show_prints_release_differences_and_training(name: str, cli: Cli) -> None:
    shown, release = cli("presets", "show", name).out, RELEASES[name]
    words = " ".join(line.removeprefix("#").strip() for line in shown.splitlines())
    assert f"Release: {release.where}." in words and release.paper in words
    for sentence in release.differs:
        assert " ".join(sentence.split()) in words
    assert ("Differs from it" in words) == bool(release.differs)
    for key in release.train:
        assert re.search(rf"^# +{key}: ", shown, flags=re.MULTILINE)


def test_what_show_prints_is_the_adapter_section_of_a_recipe(cli: Cli) -> None:
    assert list(yaml.safe_load(cli("presets", "show", "hydralora").out)) == ["adapter"]

"""`molora presets show`: release, differences and training stand above what can be pasted into a recipe."""

from __future__ import annotations

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
    lines = [line.removeprefix("# ") for line in shown.splitlines()]
    section = lines[lines.index("train:") : lines.index("adapter:")] if release.train else ["train: {}"]
    assert yaml.safe_load("\n".join(section))["train"] == dict(release.train)  # as a recipe would read it


def test_what_show_prints_is_the_adapter_section_of_a_recipe(cli: Cli) -> None:
    assert list(yaml.safe_load(cli("presets", "show", "hydralora").out)) == ["adapter"]

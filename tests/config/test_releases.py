"""What each preset follows: a release that can be found again, every difference in a sentence, and how it was trained."""

from __future__ import annotations

import re

import pytest

from molora.config.presets import PRESETS, RELEASES, summary
from molora.config.presets.release import Release
from molora.config.train import TrainConfig
from molora.errors import ConfigError

presets = pytest.mark.parametrize("name", sorted(PRESETS))


def test_every_preset_has_a_release_and_no_other() -> None:
    assert sorted(RELEASES) == sorted(PRESETS)


@presets
def test_a_release_can_be_found_again(name: str) -> None:
    release = RELEASES[name]
    assert re.search(r"arXiv:\d{4}\.\d{5}|OpenReview:\w+", release.paper)
    if release.repository is None:
        assert release.commit is None and "no code" in release.where.lower()
    else:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", release.repository)
        assert re.fullmatch(r"[0-9a-f]{7}", release.commit or "")
        assert release.where == f"{release.repository} at {release.commit}"


@presets
def test_differences_are_sentences(name: str) -> None:
    for sentence in RELEASES[name].differs:
        assert sentence[0].isupper() or sentence[0] == "`", sentence
        assert sentence.endswith(".") and len(sentence.split()) > 3, sentence


@presets
def test_the_suggested_training_is_one_that_a_recipe_may_have(name: str) -> None:
    train = dict(RELEASES[name].train)
    assert TrainConfig.model_validate(train).model_dump(include=set(train)) == train


def test_the_summary_names_the_paper() -> None:
    assert summary("mixlora").endswith("Li et al., arXiv:2404.15159")


@pytest.mark.parametrize("where", [("owner/name", None), (None, "abcdef0")])
def test_half_a_release_is_refused(where: tuple[str | None, str | None]) -> None:
    with pytest.raises(ConfigError, match="repository and commit"):
        Release(*where, paper="arXiv:2404.15159")

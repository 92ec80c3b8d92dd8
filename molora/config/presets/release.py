"""Release: which code and paper a preset follows, where it does not, and how the release was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from molora.errors import ConfigError
from molora.registry import Registry

Method = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Release:
    """What was read to write a preset, and how far the preset is from it.

    Raises:
        ConfigError: a repository without a commit, or a commit without a repository.
    """

    repository: str | None  # on GitHub, owner/name; None where no code is public
    commit: str | None  # of the repository, seven digits
    paper: str  # authors, and its number on arXiv or OpenReview
    differs: tuple[str, ...] = ()  # a sentence for each point where the preset is not what the release runs
    train: Mapping[str, Any] = field(default_factory=dict)  # how the release trains, as a recipe's `train`

    def __post_init__(self) -> None:
        if (self.repository is None) != (self.commit is None):
            raise ConfigError("a release has a repository and commit, or neither where no code is public.")

    @property
    def where(self) -> str:
        """The code and its version, in words."""
        return "no code is public" if self.repository is None else f"{self.repository} at {self.commit}"


RELEASES: Registry[Release] = Registry("release")


def follows(
    repository: str | None,
    commit: str | None,
    paper: str,
    *differs: str,
    train: Mapping[str, Any] | None = None,
) -> Callable[[Method], Method]:
    """Say what the preset below follows; the arguments are the fields of `Release`."""

    def declare(method: Method) -> Method:
        RELEASES.add(method.__name__, Release(repository, commit, paper, differs, dict(train or {})))
        return method

    return declare

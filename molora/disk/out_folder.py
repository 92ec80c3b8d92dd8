"""What a verb may put in the place of an earlier result: a folder of the same kind, never a part of a run."""

from __future__ import annotations

import os
from pathlib import Path

from molora.disk.atomic import check_target, check_writable
from molora.errors import ConfigError

_RUN_FILE = "config.yaml"
_VERSION_FILE = "version.json"
_PARTS = ("adapter", "checkpoints", "stages")


def check_out(path: str | os.PathLike[str], *sources: str | os.PathLike[str], mark: str) -> Path:
    """The absolute `path`, if a result may be written there: new, empty, or an earlier result of the same kind.

    Args:
        sources: see `check_target`.
        mark: the file that every result of this kind has, such as report.json.

    Raises:
        ConfigError: as `check_target`; or molora wrote something else there, or a run keeps it.
    """
    target = check_target(path, *sources)
    for folder in (target, *target.parents):
        if folder.name in _PARTS and (folder.parent / _RUN_FILE).is_file():
            raise ConfigError(
                f"{target} belongs to the run {folder.parent}; writing there would delete it.",
                hint="choose a folder outside the run.",
            )
        if (folder / _VERSION_FILE).is_file():
            raise ConfigError(
                f"{target} belongs to the library, whose versions never change.",
                hint="choose a folder outside it; `molora library add` makes a new version of it.",
            )
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise ConfigError(
            f"{target} holds something else that molora wrote: there is no {mark} in it. Writing there would delete it.",
            hint="choose a new or empty folder.",
        )
    check_writable(target)
    return target

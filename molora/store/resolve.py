"""One way to say which folder is meant: a path, or a version of the library."""

from __future__ import annotations

import os
from pathlib import Path

from molora.store.library import Library
from molora.store.version_names import is_reference

LIBRARY = "library"
VARIABLE = "MOLORA_LIBRARY"


def default_library() -> Path:
    """The folder that MOLORA_LIBRARY names, else `library` in the working folder."""
    return Path(os.environ.get(VARIABLE) or LIBRARY)


def resolve(given: str | os.PathLike[str]) -> Path:
    """The folder that a path, `name@alias`, `name@v2`, `name@latest` or a version's label means.

    A path that exists means itself. A version is compared with what was added.

    Raises:
        ConfigError: no library, or nothing of that name in it. AdapterError: the version has been changed.
    """
    path, text = Path(given), os.fspath(given)
    if path.exists() or not is_reference(text):
        return path
    version = Library(default_library()).find(text)
    version.verify()
    return version.folder

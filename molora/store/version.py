"""Version: one version of an adapter in a library, what it is made of, and whether it still is what was added."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.disk.card import CONFIG_FILE as ADAPTER_CONFIG
from molora.disk.manifest import MANIFEST, read_json, sha256
from molora.errors import AdapterError
from molora.store.runs import CONFIG_FILE, Run
from molora.store.version_names import Label, read_label

FORMAT = 1
VERSION_FILE = "version.json"


@dataclass(frozen=True)
class Version:
    """One version: its folder, and the facts of its version.json."""

    path: Path
    facts: dict[str, Any]

    @property
    def label(self) -> Label:
        label = read_label(self.path.name)
        assert label is not None
        return label

    @property
    def folder(self) -> Path:
        """What verbs take: a run where it was added from one, else the adapter."""
        return self.path if (self.path / CONFIG_FILE).is_file() else self.path / "adapter"

    def verify(self) -> None:
        """AdapterError where a file that was added is missing or has changed; others may have been added."""
        wanted = self.facts["files"]
        changed = [
            name
            for name, digest in wanted.items()
            if not (self.path / name).is_file() or sha256(self.path / name) != digest
        ]
        if changed:
            raise AdapterError(
                f"{self.label} is not what was added; changed or missing: {', '.join(changed)}.",
                hint="versions never change: add the changed folder as a new one, and copy this one from a backup.",
            )


def source_of(path: Path) -> tuple[Run | None, Path]:
    """The run, if it is one, and its adapter folder."""
    if (path / ADAPTER_CONFIG).is_file():
        beside = path.parent / CONFIG_FILE
        return (Run(path.parent.resolve()) if path.name == "adapter" and beside.is_file() else None), path
    run = Run.find(path)
    return run, run.trained_adapter


def files_of(run: Run | None, adapter: Path) -> dict[str, Path]:
    """Name inside the version -> file: the adapter, and what of the run lies beside it."""
    found = {
        f"adapter/{f.relative_to(adapter).as_posix()}": f for f in sorted(adapter.rglob("*")) if f.is_file()
    }
    beside = sorted(run.path.iterdir()) if run is not None else []
    apart = (VERSION_FILE, MANIFEST)  # a version may be added under another name
    return found | {
        f.name: f for f in beside if f.is_file() and not f.name.startswith(".") and f.name not in apart
    }


def digest_of(digests: dict[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_facts(file: Path) -> dict[str, Any]:
    """A file of the library; AdapterError where it is no such file, or of a newer format."""
    found = read_json(file)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        written = found.get("format") if isinstance(found, dict) else None
        raise AdapterError(
            f"{file} has format {written!r}, this molora reads {FORMAT}.", hint="update molora."
        )
    return found

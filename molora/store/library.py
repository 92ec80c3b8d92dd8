"""Library: one folder of adapters by name, in versions that never change and under aliases that move.

On disk: `<library>/<name>/<name>_v<number>_<date>/` with `version.json` and what was added (`adapter/`, and the files of
its run, so that every verb that takes a run takes a version), and `<library>/<name>/index.json` with the aliases. A
version appears whole or not at all. The index is replaced whole, under a lock, after a comparison of what is there with
what the caller saw.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molora.config.suggest import options
from molora.disk.adapter_files import check_files
from molora.disk.atomic import check_writable, remove_folder, sweep, write_folder, write_json
from molora.disk.card import WEIGHTS_FILE
from molora.disk.lock import exclusive
from molora.disk.manifest import sha256
from molora.errors import AdapterError, ConfigError
from molora.store.lineage import lineage
from molora.store.version import FORMAT, VERSION_FILE, Version, digest_of, files_of, read_facts, source_of
from molora.store.version_names import LATEST, Label, check_adapter_name, check_alias, is_number, read_label

LIBRARY_FILE, INDEX_FILE, LOCK_FILE = "library.json", "index.json", ".lock"


class Library:
    """The library in a folder. Reading needs no lock: every file is replaced whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    # -- reading ------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Adapters by name; ConfigError where the folder is no library."""
        file = self.path / LIBRARY_FILE
        if not file.is_file():
            raise ConfigError(
                f"there is no library in {self.path}.",
                hint="`molora library add` makes one; name another with --library, or in MOLORA_LIBRARY.",
            )
        read_facts(file)
        return sorted(folder.name for folder in self.path.iterdir() if (folder / INDEX_FILE).is_file())

    def versions(self, name: str) -> list[Version]:
        """Versions of an adapter, oldest first."""
        if name not in (known := self.names()):
            raise ConfigError(f"the library has no {name!r}.{options(name, known, 'It has')}")
        found = []
        for folder in (self.path / name).iterdir():
            label = read_label(folder.name)
            if label is not None and label.name == name and (folder / VERSION_FILE).is_file():
                found.append((label.number, Version(folder, read_facts(folder / VERSION_FILE))))
        return [version for _, version in sorted(found, key=lambda pair: pair[0])]

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> label of the version it means."""
        return {alias: str(entry["at"]) for alias, entry in self._index(name)["aliases"].items()}

    def find(self, reference: str) -> Version:
        """The version that a label, `name@alias`, `name@v2` or `name@latest` means; a bare name means its newest."""
        label = read_label(reference)
        name, _, which = (label.name, "@", reference) if label else reference.partition("@")
        versions = {str(version.label): version for version in self.versions(name)}
        aliases = self.aliases(name)
        if which in aliases:
            which = aliases[which]
        elif which in ("", LATEST):
            which = next(reversed(versions), "")
        elif is_number(which):
            which = next((text for text, v in versions.items() if f"v{v.label.number}" == which), which)
        if which not in versions:
            known = [*aliases, *(f"v{version.label.number}" for version in versions.values())]
            raise ConfigError(f"{name} has no {which!r}.{options(which, known, 'It has')}")
        return versions[which]

    # -- writing ------------------------------------------------------------------------------------------

    def add(
        self, source: str | os.PathLike[str], name: str, *, parents: Sequence[str] = (), note: str = ""
    ) -> tuple[Version, bool]:
        """Copy a run or an adapter folder in as the next version; False with the version that is the same already.

        Args:
            parents: references of the versions it was made of; none: those that the folder itself names.

        Raises:
            ConfigError: a bad name, or neither a run nor an adapter. AdapterError: a damaged adapter, or a full disk.
        """
        check_adapter_name(name)
        run, adapter = source_of(Path(source))
        check_files(adapter)
        self._begin(name)
        given = [str(self.find(parent).label) for parent in parents]
        with self._locked(name):
            index, there = self._index(name), self.versions(name)
            files = files_of(run, adapter)
            digests = {inside: sha256(file) for inside, file in files.items()}
            content = digest_of(digests)
            for version in there:
                if version.facts["sha256"] == content:
                    return version, False
            everything = [version.facts for other in self.names() for version in self.versions(other)]
            facts = lineage(run, adapter, everything)
            label = Label(name, index["next"], time.strftime("%Y%m%d", time.gmtime()))
            facts |= {
                "format": FORMAT,
                "label": str(label),
                "added": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "sha256": content,
                "weights_sha256": digests[f"adapter/{WEIGHTS_FILE}"],
                "parents": given or facts["parents"],
                "note": note,
                "files": digests,
            }
            # First, so that a number is never given twice, even where this is killed or the version removed.
            self._write(name, {**index, "next": label.number + 1})
            size = sum(file.stat().st_size for file in files.values())
            with write_folder(self.path / name / str(label), size=size) as folder:
                for inside, file in files.items():
                    (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, folder / inside)
                write_json(folder / VERSION_FILE, facts)
        made = self.find(str(label))
        made.verify()
        return made, True

    def tag(self, reference: str, alias: str) -> Version:
        """Give a version a new alias; ConfigError where the alias is there, since `promote` moves it."""
        version = self.find(reference)
        if (now := self.aliases(version.label.name).get(check_alias(alias))) is not None:
            raise ConfigError(
                f"{version.label.name}@{alias} is there, and means {now}.", hint="`promote` moves it."
            )
        return self._point(version, alias, None)

    def promote(self, reference: str, alias: str = "stable", *, expect: str | None = None) -> Version:
        """Let an alias mean this version from now on.

        Args:
            expect: the version that the alias means so far. Not given: what it means when this is called.

        Raises:
            AdapterError: it means another one by now.
        """
        version = self.find(reference)
        before = self.aliases(version.label.name).get(check_alias(alias))
        if expect is not None:
            before = str(self.find(_within(version.label.name, expect)).label)
        return self._point(version, alias, before)

    def rollback(self, name: str, alias: str = "stable", *, expect: str | None = None) -> Version:
        """Let an alias mean again what it meant before its last move, and return that version."""
        seen = self._entry(name, alias)["at"]
        if expect is not None:
            seen = str(self.find(_within(name, expect)).label)
        with self._locked(name):
            index, entry = self._index(name), self._entry(name, alias)
            _compare(name, alias, entry["at"], seen)
            if not entry["before"]:
                raise ConfigError(
                    f"{name}@{alias} has meant {entry['at']} only; there is nothing to go back to."
                )
            *rest, last = entry["before"]
            index["aliases"][alias] = {"at": last, "before": rest}
            self._write(name, index)
        return self.find(last)

    def remove(self, reference: str) -> Version:
        """Delete a version; ConfigError where an alias means it. Its number is not given again."""
        version = self.find(reference)
        name, label = version.label.name, str(version.label)
        with self._locked(name):
            index = self._index(name)
            meaning = [alias for alias, entry in index["aliases"].items() if entry["at"] == label]
            if meaning:
                raise ConfigError(
                    f"{label} is {', '.join(f'{name}@{alias}' for alias in meaning)}.",
                    hint="promote another version first, or remove the alias.",
                )
            for entry in index["aliases"].values():
                entry["before"] = [text for text in entry["before"] if text != label]
            self._write(name, index)
            if version.path.is_dir():
                remove_folder(version.path)
        return version

    def remove_alias(self, name: str, alias: str) -> None:
        """Forget an alias and what it has meant; versions stay."""
        with self._locked(name):
            index = self._index(name)
            self._entry(name, alias)
            del index["aliases"][alias]
            self._write(name, index)

    # -- inside -------------------------------------------------------------------------------------------

    def _point(self, version: Version, alias: str, before: str | None) -> Version:
        name, label = version.label.name, str(version.label)
        with self._locked(name):
            index = self._index(name)
            entry = index["aliases"].get(alias, {"at": None, "before": []})
            _compare(name, alias, entry["at"], before)
            if not version.path.is_dir():
                raise AdapterError(f"{label} has been removed meanwhile.", hint=f"molora library list {name}")
            if entry["at"] != label:
                kept = [*entry["before"], entry["at"]] if entry["at"] else []
                index["aliases"][alias] = {"at": label, "before": kept}
                self._write(name, index)
        return version

    def _begin(self, name: str) -> None:
        """The library and the adapter's folder with an empty index, where they are not there yet."""
        check_writable(self.path / name)
        if not (self.path / LIBRARY_FILE).is_file():
            # Another process may be beginning too.
            begun = ("library.json.tmp-", f"{name}.tmp-", ".")
            foreign = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(begun)]
            if foreign:
                raise ConfigError(
                    f"{self.path} is no library, and holds {', '.join(sorted(foreign)[:5])}.",
                    hint="choose a new or empty folder.",
                )
            write_json(self.path / LIBRARY_FILE, {"format": FORMAT})
        read_facts(self.path / LIBRARY_FILE)
        (self.path / name).mkdir(exist_ok=True)
        with exclusive(self.path / name / LOCK_FILE):
            if not (self.path / name / INDEX_FILE).is_file():
                self._write(name, {"format": FORMAT, "next": 1, "aliases": {}})

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._index(name)
        with exclusive(self.path / name / LOCK_FILE):
            sweep(self.path / name)
            yield

    def _index(self, name: str) -> dict[str, Any]:
        if name not in (known := self.names()):
            raise ConfigError(f"the library has no {name!r}.{options(name, known, 'It has')}")
        return read_facts(self.path / name / INDEX_FILE)

    def _entry(self, name: str, alias: str) -> dict[str, Any]:
        aliases = self._index(name)["aliases"]
        if alias not in aliases:
            raise ConfigError(f"{name} has no alias {alias!r}.{options(alias, list(aliases), 'Its aliases')}")
        entry: dict[str, Any] = aliases[alias]
        return entry

    def _write(self, name: str, index: dict[str, Any]) -> None:
        write_json(self.path / name / INDEX_FILE, index)


def _compare(name: str, alias: str, now: str | None, seen: str | None) -> None:
    if now != seen:
        raise AdapterError(
            f"{name}@{alias} means {now or 'nothing'}, not {seen or 'nothing'}; nothing was changed.",
            hint="another process has moved it, or it was never so: look at the list, and try again.",
        )


def _within(name: str, which: str) -> str:
    """A reference to a version of this adapter: v2 or a whole label."""
    return which if read_label(which) is not None else f"{name}@{which}"

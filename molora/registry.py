"""Registry: names that a config may use, and what each stands for. The one class behind every `kind:`-like choice.

Gates' scores, selections, transforms and noises, auxiliary losses, presets, strategies, metrics and kinds of experts
are each a Registry, so an unknown name is always refused with the nearest known one, and a name is never taken twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from molora.config.names import check_name
from molora.config.suggest import not_one_of
from molora.errors import ConfigError

T = TypeVar("T")


class Lazy(Generic[T]):
    """A part that is imported when it is first used, so that its name is known without torch.

    `where`: `module:attribute` below molora, such as "gates.selection:top_k".
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._found: list[T] = []

    def load(self) -> T:
        """Import it, once: a graph that is traced later finds it here."""
        if not self._found:
            module, _, attribute = self.where.partition(":")
            self._found.append(getattr(importlib.import_module(f"molora.{module}"), attribute))
        return self._found[0]


class Registry(Mapping[str, T], Generic[T]):
    """Named parts of one sort, in the order in which they were added. `what` one of them is, messages say: "score"."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._parts: dict[str, T | Lazy[T]] = {}
        self._sources: dict[str, str] = {}

    def add(self, name: str, part: T | Lazy[T], source: str = "molora") -> None:
        """Give `part` a name; `source` is who defines it, named where the name is taken a second time.

        Raises:
            ConfigError: the name is taken, or is no name.
        """
        check_name(name, self.what)
        if name in self._parts:
            raise ConfigError(f"there is a {self.what} {name!r} already (of {self._sources[name]}).")
        self._parts[name], self._sources[name] = part, source

    def remove(self, name: str) -> None:
        """Forget a name, so that it can be given again."""
        del self._parts[name], self._sources[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise ConfigError(f"{self.what} {self.unknown(name)}")
        part = self._parts[name]
        if isinstance(part, Lazy):
            part = self._parts[name] = part.load()
        return part

    def get(self, name: str, default: Any = None) -> Any:
        """The part of that name, or `default`."""
        return self[name] if name in self._parts else default

    def unknown(self, name: object) -> str:
        """What to say of a name that nobody gave."""
        return not_one_of(name, self._parts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

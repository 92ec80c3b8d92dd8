"""Strict YAML: booleans are true/false only, 1e-4 is a number, keys are text and unique, and every key has a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.emitter import Emitter
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.representer import SafeRepresenter
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner
from yaml.serializer import Serializer

from molora.errors import ConfigError

Path = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000  # counted after aliases are expanded, so a small file cannot stand for a huge one
MAX_DEPTH = 40

_CORE = "tag:yaml.org,2002:"
_NUMBER_START = list("-+0123456789.")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Resolver(BaseResolver):
    """YAML 1.2 scalars: `no`, `on`, `012` and `12:30` are text; `true`, `7` and `1e-4` are not."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT.pattern, _NUMBER_START),
    ("float", _FLOAT.pattern, _NUMBER_START),
):
    _Resolver.add_implicit_resolver(_CORE + _tag, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)


class _Dumper(Emitter, Serializer, SafeRepresenter, _Resolver):
    """The writer with the same idea of what is text, so that everything written is read back the same."""

    def __init__(self, stream: Any, **options: Any) -> None:
        Emitter.__init__(self, stream, allow_unicode=True, width=110)
        Serializer.__init__(self)
        SafeRepresenter.__init__(self, default_flow_style=False, sort_keys=False)
        _Resolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass
class Document:
    """What a YAML text says: plain data, and the line (from 1) each path was written on."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int | None:
        """The line of `path`, or of its nearest ancestor that was written down."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def parse(text: str, where: str = "text") -> Document:
    """Read one YAML document; raises ConfigError listing every problem as `where:line`."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_BYTES:,} bytes, which no recipe is.")
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context)
        tab = "indent with spaces: YAML takes no tabs there." if "\\t" in problem else None
        raise ConfigError(f"{where}{line}  not valid YAML: {problem}.", hint=tab) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}  not valid YAML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{where}  is nested too deeply (at most {MAX_DEPTH} levels).") from None
    if node is None:
        return Document(None)
    builder = _Builder(where)
    document = Document(builder.build(node, ()), builder.lines)
    if builder.problems:
        raise ConfigError("\n".join(builder.problems))
    return document


def dump(data: Mapping[str, Any]) -> str:
    """Write plain data so that `parse` gives exactly the same back."""
    return str(yaml.dump(data, Dumper=_Dumper))


class _Builder:
    """Turns the node graph into plain data, expanding aliases under a limit and noting lines."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[Path, int] = {}
        self.problems: list[str] = []
        self._open: list[Node] = []
        self._values = 0

    def build(self, node: Node, path: Path) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise ConfigError(f"{self.where}  stands for more than {MAX_VALUES:,} values (aliases expanded).")
        if any(node is parent for parent in self._open):
            raise ConfigError(f"{self._at(node)}  an alias contains itself.")
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{self._at(node)}  is nested too deeply (at most {MAX_DEPTH} levels).")
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._open.append(node)
        try:
            if isinstance(node, MappingNode) and node.tag == _CORE + "map":
                return self._mapping(node, path)
            if isinstance(node, SequenceNode) and node.tag == _CORE + "seq":
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.problems.append(f"{self._at(key_node)}  a key must be plain text.")
                continue
            key = key_node.value
            if key in data:
                first = self.lines[(*path, key)]
                dotted = ".".join(map(str, (*path, key)))
                self.problems.append(f"{self._at(key_node)}  {dotted}: written twice, first on line {first}.")
                continue
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            data[key] = self.build(value_node, (*path, key))
        return data

    def _scalar(self, node: Node) -> Any:
        text, kind = node.value, node.tag.removeprefix(_CORE)
        if isinstance(node, ScalarNode):
            if kind == "str":
                return text
            if kind == "null" and text in ("", "~", "null", "Null", "NULL"):
                return None
            if kind == "bool" and text.casefold() in ("true", "false"):
                return text.casefold() == "true"
            if kind == "int" and _INT.fullmatch(text) and len(text) < 20:
                return int(text)
            if kind == "float" and _FLOAT.fullmatch(text):
                return float(text.casefold().replace(".inf", "inf").replace(".nan", "nan"))
        shown = str(text)[:40]
        self.problems.append(f"{self._at(node)}  the tag or value {node.tag} {shown!r} is not allowed.")
        return None

    def _at(self, node: Node) -> str:
        return f"{self.where}:{node.start_mark.line + 1}"

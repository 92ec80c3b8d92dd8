"""load_recipe: a YAML file, a mapping or a RunConfig, plus overrides, checked as a whole; dump_recipe: back to YAML."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel

from molora.config import overrides as override
from molora.config.explain import check, report
from molora.config.run import RunConfig
from molora.config.strict_yaml import MAX_BYTES, Document, Path, dump, parse
from molora.errors import ConfigError

Recipe = str | os.PathLike[str] | Mapping[str, Any] | RunConfig
Model = TypeVar("Model", bound=BaseModel)


def load_recipe(recipe: Recipe, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a recipe.

    Args:
        recipe: path of a YAML file, the same as a mapping, or a RunConfig.
        overrides: `section.key=value` texts applied on top, in order.

    Raises:
        ConfigError: everything wrong with the recipe, each with path, line, what is allowed and the nearest name.
    """
    return load_section(RunConfig, recipe, overrides)


def load_section(
    model: type[Model],
    source: Any,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Model:
    """`load_recipe` for any section type; `complete` fills in what the source may leave out."""
    document, where = _read(source)
    data, origins = override.apply(document.data, overrides)
    data = complete(data)
    value, problems = check(model, data)

    def place(path: Path) -> str:
        origin, line = _origin(path, origins, document), document.line(path)
        return f"override {origin!r}" if origin else where if line is None else f"{where}:{line}"

    if value is None:
        ordered = sorted(problems, key=lambda path: document.line(path) or 0)
        raise ConfigError(report({path: problems[path] for path in ordered}, place, title=where))
    assert isinstance(value, model)
    return value


def dump_recipe(config: BaseModel, path: str | os.PathLike[str]) -> None:
    """Write a config as YAML that `load_recipe` reads back as an equal one."""
    FilePath(path).write_text(recipe_text(config), encoding="utf-8")


def recipe_text(config: BaseModel) -> str:
    """A config as YAML."""
    return dump(config.model_dump(mode="json"))


def _read(source: Any) -> tuple[Document, str]:
    if isinstance(source, (BaseModel, Mapping)):
        data = source.model_dump(mode="json") if isinstance(source, BaseModel) else dict(source)
        return Document(data), "the recipe"
    path = FilePath(source)
    document = parse(read_text(path), str(path))
    if not isinstance(document.data, dict):
        what = "it must be a mapping with sections such as name, base, data, train."
        raise ConfigError(f"{path}  is not a recipe: {what}")
    return document, str(path)


def read_text(path: FilePath) -> str:
    """The text of a YAML file, with the errors a user can act on."""
    if not path.is_file():
        what = "is a folder, not a recipe file" if path.is_dir() else "no such recipe file"
        hint = "`molora recipes list` shows the recipes that come with molora"
        if (path / "latest").exists() or (path / "config.yaml").is_file():
            hint = f"a run's recipe is in it: {path / ('latest' if (path / 'latest').exists() else '') / 'config.yaml'}"
        raise ConfigError(f"{path}: {what}.", hint=hint)
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES:,} bytes, which no recipe is.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}  is not UTF-8 text.") from None


def _origin(path: Path, origins: Mapping[Path, str], document: Document) -> str | None:
    """The override that set `path` or something above it; or below it, where the file does not have `path` at all."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    if path in document.lines:
        return None
    return next((text for set_path, text in origins.items() if path and set_path[: len(path)] == path), None)

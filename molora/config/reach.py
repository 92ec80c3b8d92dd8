"""What of a recipe lies outside the working folder: said before it is read or written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molora.assets import TINY
from molora.config.data import DataConfig
from molora.config.run import RunConfig


def reach(config: RunConfig) -> list[str]:
    """Bases and data on the hub, and paths outside the working folder, each as `where it stands in the recipe: what`."""
    found = [*_model("base.model", config.base.model, config.base.revision)]
    if config.features is not None:
        found += _model("features.encoder", config.features.encoder, config.features.revision)
    for name, folder in (config.adapter.from_loras or {}).items():
        found += _path(f"adapter.from_loras.{name}", folder)
    return [*found, *data_reach(config.data), *_path("output", config.output)]


def data_reach(data: DataConfig) -> Iterator[str]:
    """The same of the data alone."""
    for name, task in data.tasks.items():
        where = f"data.tasks.{name}"
        if task.dataset is not None:
            yield from _model(f"{where}.dataset", task.dataset, task.revision)
        for key in ("train", "eval", "path"):
            value = getattr(task, key)
            for path in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
                yield from _path(f"{where}.{key}", path)


def _model(where: str, name: str, revision: str | None) -> Iterator[str]:
    if name == TINY:
        return
    if Path(name).expanduser().exists():
        yield from _path(where, name)
    else:
        yield f"{where}: {name} (hub{_revision(revision)})"


def _path(where: str, path: str) -> Iterator[str]:
    real = Path(path).expanduser().resolve()
    if not real.is_relative_to(Path.cwd().resolve()):
        yield f"{where}: {real}"


def _revision(revision: str | None) -> str:
    return f", revision {revision}" if revision else ""

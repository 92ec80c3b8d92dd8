"""What differs between two versions of an adapter: settings, scores, and how far the gates have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora.disk.card import CONFIG_FILE
from molora.disk.manifest import read_json
from molora.evaluation.report import Difference, Report, differences
from molora.evaluation.routing import Matrix, RoutingSummary
from molora.store.runs import REPORT_FILE
from molora.store.version import Version

_NOT_SETTINGS = ("weights_sha256", "base_fingerprint", "peft_version", "auto_mapping")


@dataclass(frozen=True)
class VersionDiff:
    """Settings as (dotted name, before, after); scores by task and mode; drift by what the gates choose for."""

    settings: list[tuple[str, Any, Any]]
    scores: list[Difference]
    drift: dict[str, float] = field(default_factory=dict)


def version_diff(before: Version, after: Version) -> VersionDiff:
    """Compare two versions by their configs, recipes and reports; a part that one of them lacks is left out."""
    settings: list[tuple[str, Any, Any]] = []
    old, new = (_settings(version.path / "adapter") for version in (before, after))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            settings.append((name, old.get(name), new.get(name)))
    for name in ("recipe_sha256", "data_sha256"):
        one, other = before.facts.get(name), after.facts.get(name)
        if one != other:
            settings.append((name, one and one[:12], other and other[:12]))
    reports = [_report(version) for version in (before, after)]
    if reports[0] is None or reports[1] is None:
        return VersionDiff(settings, [])
    drift = routing_drift(reports[0].routing, reports[1].routing)
    return VersionDiff(settings, differences(reports[0].scores, reports[1].scores), drift)


def routing_drift(before: RoutingSummary | None, after: RoutingSummary | None) -> dict[str, float]:
    """How much of the gates' weight sits elsewhere, 0 (as before) to 1 (all of it): by `task NAME` and `layer NAME`.

    The total variation between rows of mean weights, each made to sum to 1; tasks and layers that only one of the two
    has are left out.
    """
    if before is None or after is None:
        return {}
    found = {}
    for what, old, new in (
        ("task", before.task_expert(), after.task_expert()),
        ("layer", before.layer_expert(), after.layer_expert()),
    ):
        rows = dict(_rows(new))
        for name, row in _rows(old):
            if name in rows:
                experts = {*row, *rows[name]}
                moved = sum(abs(row.get(e, 0.0) - rows[name].get(e, 0.0)) for e in experts)
                found[f"{what} {name}"] = moved / 2
    return found


def _rows(matrix: Matrix) -> Iterator[tuple[str, dict[str, float]]]:
    for name, values in zip(matrix.rows, matrix.values, strict=True):
        if (total := sum(map(abs, values))) > 0:
            yield name, {e: value / total for e, value in zip(matrix.columns, values, strict=True)}


def _settings(adapter: Path) -> dict[str, Any]:
    """The adapter's settings by dotted name."""
    plain = read_json(adapter / CONFIG_FILE)
    return dict(_flat({key: value for key, value in plain.items() if key not in _NOT_SETTINGS}))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _report(version: Version) -> Report | None:
    file = version.path / REPORT_FILE
    return Report.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None

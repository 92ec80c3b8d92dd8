"""What is known of where an adapter came from: its run, recipe, data, scores, and the versions it was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from molora.disk.manifest import read_json, sha256
from molora.errors import AdapterError
from molora.store.runs import CONFIG_FILE, Run

FUSION_FILE = "fusion.json"


def lineage(run: Run | None, adapter: Path, known: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts for `version.json`: `run`, `recipe_sha256`, `data_sha256`, `scores`, `parents`; those that are known.

    Args:
        run: where the adapter was trained, if that is known.
        known: facts of the versions that are there, among which parents are looked for.
    """
    found: dict[str, Any] = {"parents": []}
    names = {facts["run"]: facts["label"] for facts in known if facts.get("run")}
    weights = {facts["weights_sha256"]: facts["label"] for facts in known}
    if run is not None:
        found["run"] = f"{run.path.parent.name}/{run.path.name}"
        found["recipe_sha256"] = sha256(run.path / CONFIG_FILE)
        found["data_sha256"] = data_sha256(run.config.model_dump(mode="json")["data"])
        report = run.report
        found["scores"] = scores(report)
        grown = (report or {}).get("facts", {}).get("parent")
        found["parents"] = [names[grown]] if grown in names else []
    with suppress(AdapterError):
        parts = read_json(adapter / FUSION_FILE).get("sources", [])
        found["parents"] = [weights[part["sha256"]] for part in parts if part.get("sha256") in weights]
    return found


def scores(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A report's scores, without what readers can derive."""
    keep = ("task", "mode", "metric", "value")
    return [{key: row.get(key) for key in keep} for row in (report or {}).get("scores", [])]


def data_sha256(data: Mapping[str, Any]) -> str:
    """A hash of a recipe's `data` section and of the bytes of the local files it names, where they are still there."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name, task in sorted(data["tasks"].items()):
        for key in ("train", "eval", "path"):
            value = task.get(key)
            for path in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
                for file in _files(Path(path).expanduser()):
                    digest.update(f"{name}/{key}/{file.name}/{sha256(file)}".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []

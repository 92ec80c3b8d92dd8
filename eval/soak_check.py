"""Whether a run that was killed and resumed is the one that was left alone: weights, rows, scores, files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from eval.soak_recipes import NAME, Kind

TIMES = {"tokens_per_second"}
_TEMPORARY = re.compile(r"\.(tmp|old)-\d+-[0-9a-f]{8}$|\.part$|\.tmp$")
_SCORES = ("scores", "before", "matrices", "inferred", "unchanged")


def lost_checkpoint(folder: Path, saved: Path | None) -> str | None:
    """After a kill: whether a checkpoint that was wholly written before it can no longer be gone on from."""
    from molora.store.runs import checkpoint_step, latest_valid

    if saved is None or (saved.parents[1] / "adapter").is_dir():
        return None
    newest = latest_valid(saved.parent)
    if newest is not None and checkpoint_step(newest) >= checkpoint_step(saved):
        return None
    return f"{saved.relative_to(folder)} was written and is gone or damaged; the newest good one is {newest}"


def damaged_checkpoints(folder: Path) -> list[str]:
    """Checkpoints with a manifest that they do not agree with."""
    from molora.disk.manifest import is_complete

    found = [manifest.parent for manifest in folder.glob("**/step-*/MANIFEST.json")]
    return [str(path.relative_to(folder)) for path in found if not is_complete(path)]


def differences(kind: Kind, reference: Path, folder: Path) -> list[str]:
    """In words, how the finished run in `folder` differs from the reference, or is not in order. Empty: it does not."""
    from molora.disk.manifest import is_complete
    from molora.store.runs import Run

    whole, ours = (Run.find(path / "runs" / kind.name).path for path in (reference, folder))
    found = [f"left over: {path.relative_to(folder)}" for path in _temporaries(folder)]
    found += [f"damaged: {name}" for name in damaged_checkpoints(folder)]
    found += [
        f"incomplete: {path.relative_to(folder)}"
        for path in folder.glob("runs/**/step-*")
        if not is_complete(path)
    ]
    latest = folder / "runs" / kind.name / "latest"
    if not latest.is_symlink() or latest.resolve() != ours.resolve():
        found.append("latest does not point to the run")
    names, wanted = _names(ours), _names(whole)
    found += [f"missing: {name}" for name in sorted(wanted - names)]
    found += [f"not in the uninterrupted run: {name}" for name in sorted(names - wanted)]
    for name in sorted(names & wanted):
        found += _compare(name, whole / name, ours / name)
    if kind.name != NAME:  # the run that grew is left as it was
        found += _changed_parent(reference, folder)
    return found


def _temporaries(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if _TEMPORARY.search(path.name)]


def _names(run: Path) -> set[str]:
    """Files of a run but for its checkpoints, of which a signal adds one, and TensorBoard's own."""
    files = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {str(path) for path in files if not {"checkpoints", "tb"} & set(path.parts)}


def _compare(name: str, whole: Path, ours: Path) -> list[str]:
    if whole.suffix == ".safetensors":
        return [f"{name}: {problem}" for problem in _unequal_tensors(whole, ours)]
    if whole.name == "metrics.csv":
        return [f"{name}: {problem}" for problem in _unequal_rows(_rows(whole), _rows(ours))]
    if whole.name in ("report.json", "matrix.json", "row.json", "base.json"):
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (whole, ours))
        keys = [key for key in _SCORES if before.get(key) != after.get(key)]
        return [f"{name}: other {', '.join(keys)}"] if keys else []
    return []


def _unequal_tensors(whole: Path, ours: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file

    before, after = load_file(whole), load_file(ours)
    if before.keys() != after.keys():
        return [f"other tensors: {', '.join(sorted(before.keys() ^ after.keys())[:3])}"]
    unequal = [key for key in before if not torch.equal(before[key], after[key])]
    return [f"{len(unequal)} of {len(before)} tensors unequal, as {unequal[0]}"] if unequal else []


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: cell for key, cell in row.items() if cell and key not in TIMES}
            for row in csv.DictReader(file)
        ]


def _unequal_rows(whole: list[dict[str, str]], ours: list[dict[str, Any]]) -> list[str]:
    steps, wanted = ([row["step"] for row in rows] for rows in (ours, whole))
    if steps != wanted:
        return [f"rows of steps {', '.join(steps)} instead of {', '.join(wanted)}"]
    return [
        f"step {a['step']}: {key} is {b.get(key)} instead of {a.get(key)}"
        for a, b in zip(whole, ours, strict=True)
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _changed_parent(reference: Path, folder: Path) -> list[str]:
    from molora.disk.manifest import sha256
    from molora.store.runs import Run

    whole, ours = (Run.find(path / "runs" / NAME).path for path in (reference, folder))
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    names |= {str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file()}
    changed = [
        name
        for name in sorted(names)
        if not ((whole / name).is_file() and (ours / name).is_file())
        or sha256(whole / name) != sha256(ours / name)
    ]
    return [f"the run that grew changed: {name}" for name in changed]

"""The scores after each turn as files: JSON, CSV and a picture, rewritten after every turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from molora.data.tasks import Task
from molora.disk.atomic import write_file, write_json
from molora.disk.manifest import read_json
from molora.evaluation.continual import AccuracyMatrix, StageScores, TurnScores
from molora.evaluation.routing import Matrix
from molora.report.plots import plot_heatmap

VIEWS = {"shown": "task ids given", "hidden": "task ids hidden"}


def matrices(
    tasks: Sequence[str], base: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> dict[str, AccuracyMatrix]:
    """The accuracy matrix with task ids and, where anything was measured, the one without."""
    found = {}
    for view in VIEWS:
        values = [[row[view].get(task) for task in tasks] for row in rows]
        if any(value is not None for row in values for value in row):
            start = [base.get(task) for task in tasks] if view == "shown" else []
            found[view] = AccuracyMatrix(list(tasks), start, values, joint=bool(rows[0]["joint"]))
    return found


def write_tables(folder: Path, tasks: Sequence[Task], rows: Sequence[Mapping[str, Any]]) -> None:
    """matrix.json with everything, matrix.csv and matrix.png for each view."""
    names = [task.name for task in tasks]
    found = matrices(names, read_json(folder / "base.json"), rows)
    last = rows[-1]
    inferred = last["inferred"]
    plain = {
        "matrices": {view: matrix.to_dict() for view, matrix in found.items()},
        "inferred": inferred,
        "task_inference": sum(inferred.values()) / len(inferred) if inferred else None,
        "unchanged": last["unchanged"],
        "overlap": last["overlap"],
    }
    write_json(folder / "matrix.json", plain)
    for view, matrix in found.items():
        name = "matrix" if view == "shown" else f"matrix_{view}"
        write_file(folder / f"{name}.csv", matrix.to_csv().encode())
        draw(matrix, folder / f"{name}.png", VIEWS[view])


def write_stages(
    folder: Path, stages: Sequence[str], tasks: Sequence[Task], rows: Sequence[Mapping[str, Any]]
) -> None:
    """stages.json with everything of a staged run, stages.csv and stages.png of its scores with task ids."""
    names, base = [task.name for task in tasks], read_json(folder / "base.json")
    shown = [[row["shown"].get(name) for name in names] for row in rows]
    found = StageScores(names, [base.get(name) for name in names], shown, list(stages))
    last = rows[-1]
    same = {"inferred": last["inferred"], "unchanged": last["unchanged"], "overlap": last["overlap"]}
    write_json(folder / "stages.json", {"scores": asdict(found), "hidden": last["hidden"], **same})
    write_file(folder / "stages.csv", found.to_csv().encode())
    draw(found, folder / "stages.png", VIEWS["shown"])


def draw(matrix: TurnScores, out: Path, view: str) -> Path:
    """The scores as coloured cells: tasks from left to right, turns from top to bottom."""
    names = ["base"] * bool(matrix.base) + [f"after {name}" for name in matrix.turn_names]
    values = [[math.nan if v is None else v for v in row] for _, row in matrix.turns()]
    shown = Matrix(names, list(matrix.tasks), values)
    return plot_heatmap(shown, out, title=f"scores, {view}", xlabel="task", ylabel="", unit="score")

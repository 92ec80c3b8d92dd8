"""The continual benchmark: its grid, its table from the cells that are committed, and one cell from end to end."""

from __future__ import annotations

import gzip
import json

import pytest

from eval import continual
from molora.config import load_recipe
from tests.training.runs import write_encoder


def write_data(folder):
    """Two tasks in the benchmark's format."""
    (folder / "cl15").mkdir(parents=True)
    labels = {"agnews": ["World", "Sports"], "dbpedia": ["Company", "Artist", "Sports"]}
    for task, names in labels.items():
        rows = [
            {
                "text": f"{task} text {i}",
                "label_text": names[i % len(names)],
                "label": i % len(names),
                "split": split,
            }
            for split in ("train", "dev", "test")
            for i in range(12)
        ]
        with gzip.open(folder / "cl15" / f"{task}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.json").write_text(json.dumps({"cl15": {t: {"labels": n} for t, n in labels.items()}}))
    return folder


def test_the_grid_is_whole():
    cells = continual.grid()
    assert len({cell.name for cell in cells}) == len(cells)
    for method in ("sequential", "inc_lora", "o_lora", continual.DEFAULT, "joint"):
        found = {(c.suite, c.seed) for c in cells if c.method == method and c.suite in continual.SHORT}
        assert found == {(suite, seed) for suite in continual.SHORT for seed in range(3)}
    assert {c.method for c in cells} == set(continual.METHODS)
    assert all(len(set(order.split())) == len(order.split()) for order in continual.ORDERS.values())
    assert {len(continual.ORDERS[f"order{i}"].split()) for i in (4, 5, 6)} == {15}


@pytest.mark.parametrize("method", continual.METHODS)
def test_every_cell_is_a_valid_recipe(method, tmp_path, monkeypatch):
    monkeypatch.setitem(continual.ORDERS, "two", "dbpedia agnews")
    data = write_data(tmp_path / "data")
    recipe = continual.recipe(continual.Cell("two", method, 0), data, tmp_path, "encoder")
    asked = continual.METHODS[method]["strategy"]
    kind = asked if isinstance(asked, str) else asked["kind"]
    assert load_recipe(recipe).continual.strategy.kind == kind


def test_a_cell_runs_and_the_table_shows_it(tmp_path, monkeypatch):
    for name, value in (("TRAIN", 8), ("TEST", 4), ("STEPS", 2), ("BATCH", 4), ("CELLS", tmp_path / "cells")):
        monkeypatch.setattr(continual, name, value)
    monkeypatch.setitem(continual.ORDERS, "order1", "dbpedia agnews")
    monkeypatch.setattr(continual, "grid", lambda: [continual.Cell("order1", "color", 0)])
    base = str(write_encoder(tmp_path / "base"))
    continual.run_grid(write_data(tmp_path / "data"), base, "")
    (cell,) = continual.load_cells()
    assert (
        cell["matrices"]["shown"]["tasks"] == ["dbpedia", "agnews"]
        and len(cell["matrices"]["hidden"]["rows"]) == 2
    )
    assert cell["unchanged"] == {"dbpedia": True, "agnews": True}
    line = next(line for line in continual.page([cell]).splitlines() if line.startswith("| color"))
    assert line.split("|")[2].strip() == "1"
    continual.run_grid(tmp_path / "nowhere", base, "")  # nothing is left to do


def test_an_interval_is_students():
    assert continual.interval([0.5]) == "50.0"
    assert continual.interval([0.4, 0.5, 0.6]) == "50.0 ± 24.8"


def test_the_committed_page_is_that_of_the_committed_cells():
    cells = continual.load_cells()
    assert cells
    assert (continual.RESULTS / "continual.md").read_text(encoding="utf-8") == continual.page(cells)


def test_the_default_keeps_every_old_answer_in_the_committed_cells():
    chosen = [cell for cell in continual.load_cells() if cell["method"] == continual.DEFAULT]
    assert chosen
    for cell in chosen:
        assert all(cell["unchanged"].values())
        assert cell["matrices"]["shown"]["summary"]["forgetting"] == 0

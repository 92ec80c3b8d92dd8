"""The continual benchmark: its grid, its table from the cells that are committed, and one cell from end to end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eval import continual
from eval.continual_grid import DEFAULT, NAMERS, SHORT
from eval.continual_page import differences, even, interval, page
from molora.config import load_recipe
from tests.training.runs import write_encoder
from tests.training.test_seq2seq import write_t5

MODEL = {"base": {"model": "encoder", "task_type": "SEQ_CLS", "head": "match"}}


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
    for method in ("sequential", "inc_lora", "o_lora", DEFAULT, "joint"):
        found = {(c.suite, c.seed) for c in cells if c.method == method and c.suite in SHORT}
        assert found == {(suite, seed) for suite in SHORT for seed in range(3)}
    assert {c.method for c in cells} == set(continual.METHODS) - set(NAMERS)
    assert all(len(set(order.split())) == len(order.split()) for order in continual.ORDERS.values())
    assert {len(continual.ORDERS[f"order{i}"].split()) for i in (4, 5, 6)} == {15}


@pytest.mark.parametrize("method", continual.METHODS)
def test_every_cell_of_superni_is_a_valid_recipe(method, tmp_path, monkeypatch):
    (tmp_path / "gen" / "superni").mkdir(parents=True)
    for task in continual.ORDERS["superni1"].split():
        rows = [
            {"prompt": f"What is {i}?\nOutput:", "answer": str(i), "split": split}
            for split in ("train", "dev", "test")
            for i in range(60)
        ]
        with gzip.open(tmp_path / "gen" / "superni" / f"{task}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("eval.smollm2.smollm2", lambda: tmp_path / "smollm2")
    cell = continual.Cell("superni1", method, 0)
    made = load_recipe(continual.recipe(cell, tmp_path, tmp_path, continual.SMOLLM2))
    assert made.base.model == str(tmp_path / "smollm2")
    assert (made.train.max_steps, made.train.batch_size, len(made.data.tasks)) == (60, 8, 6)
    task = next(iter(made.data.tasks.values()))
    held_out = Path(task.eval).read_text(encoding="utf-8").splitlines()
    assert len(held_out) == continual.SHORT_TEST
    assert json.loads(held_out[7]) == {"prompt": "What is 7?\nOutput:", "target": " 7"}
    assert task.metric == "exact_match"


@pytest.mark.parametrize("method", continual.METHODS)
def test_every_cell_is_a_valid_recipe(method, tmp_path, monkeypatch):
    monkeypatch.setitem(continual.ORDERS, "two", "dbpedia agnews")
    data = write_data(tmp_path / "data")
    recipe = continual.recipe(continual.Cell("two", method, 0), data, tmp_path, MODEL)
    asked = continual.METHODS[method]["strategy"]
    kind = asked if isinstance(asked, str) else asked["kind"]
    assert load_recipe(recipe).continual.strategy.kind == kind


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The benchmark with two tasks, two steps and few rows."""
    for name, value in (("TRAIN", 8), ("TEST", 4), ("STEPS", 2), ("BATCH", 4)):
        monkeypatch.setattr(continual, name, value)
    monkeypatch.setitem(continual.ORDERS, "order1", "dbpedia agnews")
    return write_data(tmp_path / "data")


def test_a_cell_runs_and_the_table_shows_it(small, tmp_path, monkeypatch):
    base = str(write_encoder(tmp_path / "base"))
    monkeypatch.setattr(continual, "minilm", lambda: base)
    cells = [continual.Cell("order1", "color", 0)]
    continual.run_grid(cells, small, tmp_path / "cells")
    (cell,) = continual.load_cells(tmp_path / "cells")
    assert (
        cell["matrices"]["shown"]["tasks"] == ["dbpedia", "agnews"]
        and len(cell["matrices"]["hidden"]["rows"]) == 2
    )
    assert cell["unchanged"] == {"dbpedia": True, "agnews": True}
    line = next(line for line in page([cell]).splitlines() if line.startswith("| color"))
    assert line.split("|")[2].strip() == "1"
    continual.run_grid(cells, tmp_path / "nowhere", tmp_path / "cells")  # nothing is left to do
    with pytest.raises(SystemExit, match=r"order1_color_0.json was not made with this .* --test"):
        continual.run_grid(cells, small, tmp_path / "cells", test=7)


def test_the_rows_tested_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(continual.ORDERS, "two", "dbpedia agnews")
    data = write_data(tmp_path / "data")
    made = continual.recipe(continual.Cell("two", "color", 0), data, tmp_path, MODEL, test=3)
    for task in made["data"]["tasks"].values():
        assert len(Path(task["eval"]).read_text(encoding="utf-8").splitlines()) == 3


def test_another_model_is_a_recipe(small, tmp_path, monkeypatch, capsys):
    sections = tmp_path / "t5.yaml"
    sections.write_text(
        f"base: {{model: {write_t5(tmp_path / 'base')}, task_type: SEQ_2_SEQ_LM}}\n"
        "adapter: {target_modules: [q, v]}\ntrain: {max_steps: 3, precision: 32-true}\neval: {max_new_tokens: 2}\n"
    )
    monkeypatch.setattr(continual, "quiet_process", lambda: None)  # starts the process again
    call = ["continual", "run", "--data", str(small), "--recipe", str(sections), "--suite", "order1"]
    cells = ["--cells", str(tmp_path / "cells")]
    monkeypatch.setattr("sys.argv", [*call, *cells, "--methods", "o_lora", "--seeds", "4"])
    continual.main()
    (cell,) = continual.load_cells(tmp_path / "cells")
    assert (cell["method"], cell["seed"], cell["settings"]["steps"]) == ("o_lora", 4, 3)
    monkeypatch.setattr("sys.argv", ["continual", "table", *cells])
    continual.main()
    assert "| o_lora | 1 |" in (tmp_path / "cells.md").read_text()
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises(SystemExit):
        continual.main()
    assert "a folder of its own" in capsys.readouterr().err
    sections.write_text(sections.read_text().replace("max_steps: 3", "max_steps: 4"))
    monkeypatch.setattr("sys.argv", [*call, *cells, "--methods", "o_lora", "--seeds", "4"])
    with pytest.raises(SystemExit, match="not made with this --recipe"):
        continual.main()
    sections.write_text("base: {model: x}\noptimizer: {}\n")
    with pytest.raises(SystemExit, match=r"wrong: \['optimizer'\]"):
        continual.read_sections(sections)


def test_a_recipe_may_count_epochs(tmp_path, monkeypatch):
    monkeypatch.setitem(continual.ORDERS, "two", "dbpedia agnews")
    data = write_data(tmp_path / "data")
    found = continual.recipe(
        continual.Cell("two", "color", 0), data, tmp_path, MODEL | {"train": {"epochs": 1}}
    )
    assert (load_recipe(found).train.epochs, load_recipe(found).train.max_steps) == (1, None)


def test_differences_are_of_runs_of_one_order_and_seed():
    def cell(method, suite, seed, end):
        shown = {"tasks": ["a"], "base": [0.0], "rows": [[end]], "joint": False}
        return {"method": method, "suite": suite, "seed": seed, "matrices": {"shown": shown}}

    cells = [
        cell("joint", "order1", 0, 0.75),
        cell(DEFAULT, "order1", 0, 0.5),
        cell(DEFAULT, "order1", 1, 0.1),
    ]
    assert differences(cells, SHORT).splitlines()[2:] == [f"| joint - {DEFAULT} | 1 |  | 25.0 |"]


def test_seeds_are_compared_over_the_same_orders():
    cells = [{"suite": suite, "seed": seed} for suite, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert even(cells) == [cells[0], cells[2]]
    assert even(cells[:2]) == cells[:2]


def test_an_interval_is_students():
    assert interval([(0, 0.5)]) == "50.0"
    assert interval([(0, 0.4), (1, 0.5), (2, 0.6)]) == "50.0 ± 24.8"
    # The runs of one seed are one sample.
    assert interval([(0, 0.3), (0, 0.5), (1, 0.5), (2, 0.7), (2, 0.5)]) == "50.0 ± 24.8"


def test_the_committed_page_is_that_of_the_committed_cells():
    cells = continual.load_cells(continual.CELLS)
    assert cells
    assert (continual.RESULTS / "continual.md").read_text(encoding="utf-8") == page(cells)


def test_the_default_keeps_every_old_answer_in_the_committed_cells():
    chosen = [cell for cell in continual.load_cells(continual.CELLS) if cell["method"] == DEFAULT]
    assert chosen
    for cell in chosen:
        assert all(cell["unchanged"].values())
        assert cell["matrices"]["shown"]["summary"]["forgetting"] == 0

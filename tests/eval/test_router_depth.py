"""The router's depths: rows of features that are easy to tell apart, and the page of the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval import router_depth as script
from eval.bench.common import RESULTS
from eval.router_depth_page import page

TASKS = {"pair": ["a", "b"]}


@pytest.fixture
def read():
    """Depth 0 says nothing of the task, depth 1 everything."""
    torch.manual_seed(0)
    shapes = {"train": 40, "test": 20}
    told = torch.tensor([0.0, 50.0], dtype=torch.float64).reshape(2, 1, 1)
    return {
        task: {
            split: torch.randn(2, count, 6, dtype=torch.float64) + (2 * place - 1) * told
            for split, count in shapes.items()
        }
        for place, task in enumerate("ab")
    }


def test_a_row_for_each_depth_with_what_is_left_to_adapt(read):
    base = script.Base("a base", ("pair",), 40, 20, every=2, linears=3)
    pytest.importorskip("sklearn")
    rows = [*script.by_depth(read, TASKS, base, blocks=6)]
    assert [(row["block"], row["linears left"]) for row in rows] == [(0, 18), (2, 12)]
    assert all(rows[1][kind] == 100 and 20 < rows[0][kind] < 80 for kind in script.KINDS)


def test_a_row_for_each_number_of_examples(read):
    rows = [*script.by_shrinkage(read, TASKS, 1)]
    assert [row["examples"] for row in rows] == [*script.EXAMPLES]
    assert all(row[str(s)] == 100 for row in rows for s in script.SHRINKAGES)
    shares = [row["auto is"] for row in rows]
    assert shares[0] > shares[1] and all(0 < share <= 1 for share in shares)


def test_texts_are_the_first_of_each_split(tmp_path):
    import gzip

    rows = [{"text": f"{split} {i}", "split": split} for i in range(5) for split in ("train", "test")]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    few = script.Base("a base", (), train=3, test=1, every=1, linears=1)
    assert script.texts_of(tmp_path, "a", few) == {
        "train": ["train 0", "train 1", "train 2"],
        "test": ["test 0"],
    }


def test_the_committed_page_is_that_of_the_committed_figures():
    found = json.loads((RESULTS / "router_depth.json").read_text(encoding="utf-8"))
    assert set(found["bases"]) == set(script.BASES)
    assert Path(RESULTS / "router_depth.md").read_text(encoding="utf-8") == "\n".join(page(found)) + "\n"

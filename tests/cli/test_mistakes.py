"""What a newcomer does wrong: one screen, the right exit code, and the way out in the message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from molora.training.train import train
from tests.cli.conftest import Cli
from tests.training.runs import recipe_for, write_base, write_encoder

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, data in several states, recipes, and a finished run."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_base(folder / "base")
    write_encoder(folder / "encoder")
    recipe = recipe_for(folder / "base", folder / "runs", max_steps=1)
    train(recipe)
    files = {
        "qa.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "empty.jsonl": "",
        "array.json": json.dumps(ROWS),
        "array.jsonl": json.dumps(ROWS, indent=1),
        "semicolons.csv": "question;answer\n1 + 1?;2\n2 + 1?;3\n",
        "mood.jsonl": "".join(json.dumps({"text": f"day {i}", "label": "good"}) + "\n" for i in range(4)),
        "two.jsonl": "".join(json.dumps({"text": f"day {i}", "label": "gb"[i % 2]}) + "\n" for i in range(4)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "utf16.jsonl").write_text(files["qa.jsonl"], encoding="utf-16")
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    growth = {
        "task": {"name": "loud", "source": "synthetic", "generator": "loud", "train_size": 8, "eval_size": 2}
    }
    (folder / "growth.yaml").write_text(yaml.safe_dump(growth), encoding="utf-8")
    return folder


QA = "data.tasks.qa={source: jsonl, train: FILE, prompt: '{question} ', target: '{answer}'}"
MOOD = "data.tasks.mood={source: jsonl, kind: classification, train: FILE}"

# Words of the command, exit code, and what the message must say: what is wrong, and what to do.
MISTAKES: dict[str, tuple[list[str], int, list[str]]] = {
    "no such verb": (["tran", "small.yaml"], 2, ["Did you mean", "train"]),
    "no such recipe": (["train", "smal.yaml"], 2, ["no such recipe file", "molora recipes list"]),
    "a run instead of a recipe": (["train", "runs/small"], 2, ["runs/small/latest/config.yaml"]),
    "a growth instead of a recipe": (["train", "growth.yaml"], 2, ["molora add-expert RUN --recipe growth.yaml"]),
    "a recipe instead of a growth": (["add-expert", "runs/small", "--recipe", "small.yaml"], 2, ["molora train"]),
    "a sequence without a strategy": (["continual", "small.yaml"], 2, ["continual: {strategy: ...}", "molora train"]),
    "a misspelt key": (["train", "small.yaml", "train.learning_rate=1"], 2, ["not a setting", "lr"]),
    "a key without its section": (["train", "small.yaml", "lr=1"], 2, ["train.lr"]),
    "no value": (["train", "small.yaml", "train.lr"], 2, ["section.key=value"]),
    "half weights": (["train", "small.yaml", "train.precision=bf16"], 2, ["bf16-mixed", "base.dtype: bfloat16"]),
    "more chosen than there are": (
        ["train", "small.yaml", "adapter.gate={kind: top_k, top_k: 9}"], 2, ["9 is more than num_experts"],
    ),
    "a misspelt target": (["train", "small.yaml", "adapter.target_modules=[q_porj]"], 2, ["q_proj"]),
    "a misspelt generator": (
        ["train", "small.yaml", "data.tasks.x={source: synthetic, generator: revers}"], 2, ["reverse"],
    ),
    "a file that is not there": (["train", "small.yaml", QA.replace("FILE", "q.jsonl")], 3, ["q.jsonl", "No such file"]),
    "an empty file": (["train", "small.yaml", QA.replace("FILE", "empty.jsonl")], 3, ["empty.jsonl", "no records"]),
    "one JSON array": (["train", "small.yaml", QA.replace("FILE", "array.jsonl")], 3, ["one JSON object per line"]),
    "UTF-16": (["train", "small.yaml", QA.replace("FILE", "utf16.jsonl")], 3, ["UTF-16", "save the file as UTF-8"]),
    "a wrong column": (
        ["train", "small.yaml", QA.replace("FILE", "qa.jsonl").replace("{question}", "{questoin}")], 3,
        ["questoin", "Did you mean 'question'"],
    ),
    "semicolons": (
        ["train", "small.yaml", QA.replace("jsonl", "csv", 1).replace("FILE", "semicolons.csv")], 3,
        ["separated by semicolons", "with commas"],
    ),
    "one label": (["train", "small.yaml", MOOD.replace("FILE", "mood.jsonl")], 2, ["1 different value", "labels"]),
    "a label that is not listed": (
        ["train", "small.yaml", MOOD.replace("FILE}", "two.jsonl, labels: [good, b]}")], 3,
        ["'g' is not a label", "good, b"],
    ),
    "everything cut": (["train", "small.yaml", "data.max_length=4"], 3, ["leaves nothing", "raise data.max_length"]),
    "a base that is not there": (["train", "small.yaml", "base=bas"], 2, ["cannot load 'bas'", "molora/tiny"]),
    "an encoder to write": (["train", "small.yaml", "base=encoder"], 2, ["is an encoder", "SEQ_CLS"]),
    "nothing to resume": (["train", "small.yaml", "--resume", "name=other"], 2, ["no run", "other"]),
    "another recipe to resume": (["train", "small.yaml", "--resume", "train.lr=0.5"], 2, ["train.lr", "without --resume"]),
    "validating on nothing": (
        ["train", "small.yaml", "train.val_every=1", "data.tasks.copy.eval_size=null"], 0, [],
    ),
    "no such run": (["eval", "runs/smal"], 2, ["no run", "Runs in", "small"]),
    "no such task": (["eval", "runs/small", "--task", "cpy"], 2, ["Did you mean 'copy'"]),
    "percent": (["eval", "runs/small", "--fail-under", "90"], 2, ["0.9"]),
    "no such step": (["eval", "runs/small", "--checkpoint", "5"], 4, ["Steps it has: 1", "train.save_every"]),
    "no predictions": (["compare", "runs/small", "runs/small"], 4, ["molora eval runs/small --predictions"]),
    "no such expert": (["export", "runs/small", "--expert", "expert_7", "--out", "x"], 2, ["expert_0"]),
    "a gate that depends on the text": (["merge", "runs/small", "--out", "x"], 2, ["--task", "--expert"]),
    "a task that is there": (
        ["add-expert", "runs/small", "--task", "copy", "--synthetic", "copy"], 2, ["has task 'copy' already"],
    ),
    "no data for a new task": (["add-expert", "runs/small", "--task", "new"], 2, ["--data FILE"]),
    "LoRAs without names": (["compose", "base", "loras/a", "--out", "x"], 2, ["math=loras/math"]),
    "no folder to begin from": (["init", "dta", "--base", "base"], 3, ["no such folder"]),
    "nothing known in it": (["init", "base", "--base", "base"], 3, [".jsonl"]),
    "a recipe is there already": (["init", "qa.jsonl", "--base", "base", "--out", "small.yaml"], 2, ["--force"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, code, said = MISTAKES[mistake]
    found = cli(*words)
    assert found.code == code, found.err
    for text in said:
        assert text in " ".join(found.err.split()), found.err
    assert "Traceback" not in found.err and "internal error" not in found.err
    assert sum(1 + len(line) // 80 for line in found.err.splitlines()) <= 24, found.err  # one screen

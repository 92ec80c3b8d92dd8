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
    small = (folder / "small.yaml").read_text(encoding="utf-8")
    (folder / "tabs.yaml").write_text("name: x\nbase:\n\tmodel: molora/tiny\n", encoding="utf-8")
    (folder / "twice.yaml").write_text(f"{small}\nname: other\n", encoding="utf-8")
    (folder / "blank.yaml").write_text("", encoding="utf-8")
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
    "a tab in YAML": (["train", "tabs.yaml"], 2, ["tabs.yaml:3", "indent with spaces"]),
    "a key written twice": (["train", "twice.yaml"], 2, ["name: written twice", "first on line"]),
    "an empty recipe": (["train", "blank.yaml"], 2, ["is not a recipe", "name, base, data, train"]),
    "a misspelt preset": (["train", "small.yaml", "adapter.preset=mixlra"], 2, ["Did you mean 'mixlora'"]),
    "words for a number": (["train", "small.yaml", "train.max_steps=ten"], 2, ["must be a whole number"]),
    "float16 on a CPU": (["train", "small.yaml", "train.precision=16-mixed"], 2, ["none is used here", "bf16-mixed"]),
    "a path for a task's name": (
        ["train", "small.yaml", "data.tasks.a/b={source: synthetic, generator: reverse}"], 2, ["contains '/'"],
    ),
    "a run outside its folder": (["train", "small.yaml", "name=../x"], 2, ["contains '/'", "letters, digits"]),
    "a hub name offline": (
        ["train", "small.yaml", "base=org/model"], 2, ["no such folder", "the cache"],
    ),
    "the file of training again": (
        ["validate", "small.yaml", QA.replace("FILE", "qa.jsonl, eval: qa.jsonl")], 0,
        ["8 of 8 held-out prompts", "scores will be too good"],
    ),
    "too many made-up records": (["train", "small.yaml", "data.tasks.copy.train_size=99999999"], 2, ["at most 1,000,000"]),
    "a file instead of a run": (["eval", "qa.jsonl"], 2, ["is not a run folder", "molora train"]),
    "a model instead of a run": (["inspect", "base"], 2, ["is not a run folder"]),
    "nothing to answer": (["generate", "runs/small"], 2, ["--prompt TEXT", "--file FILE"]),
    "an answer by no such task": (
        ["generate", "runs/small", "--prompt", "x", "--task", "cop"], 2, ["Did you mean 'copy'"],
    ),
    "a router that is not there": (["route", "runs/small", "--prompt", "x"], 2, ["adapter.router: gaussian"]),
    "LoRAs to fuse without names": (["fuse", "base", "--out", "x"], 2, ["NAME=FOLDER"]),
    "a bad name in the library": (["library", "add", "runs/small", "Bad Name"], 2, ["medical_diagnosis"]),
    "no library": (["library", "show", "nothing@stable"], 2, ["no library in", "--library"]),
    "a folder of somebody else": (
        ["export", "runs/small", "--expert", "expert_0", "--out", "base"], 2, ["did not write", "new or empty folder"],
    ),
    "the working folder": (["export", "runs/small", "--expert", "expert_0", "--out", "."], 2, ["is the working folder"]),
    "no name of a repository": (["push", "runs/small", "not a name"], 2, ["no repository name", "me/"]),
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
        assert text in " ".join((found.err if code else found.out).split()), found.err
    assert "Traceback" not in found.err and "internal error" not in found.err
    assert sum(1 + len(line) // 80 for line in found.err.splitlines()) <= 24, found.err  # one screen

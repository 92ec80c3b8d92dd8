"""`molora init`: from a folder of files to a scored, exported mixture in three commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from molora.config import load_recipe
from molora.data.recognise import layout_of, recognise
from molora.errors import DataError
from molora.store.runs import Run
from tests.cli.conftest import Cli
from tests.training.runs import write_base, write_encoder

ROWS: dict[str, list[dict[str, Any]]] = {
    "copy": [{"prompt": f"copy({i})=", "response": f"{i}"} for i in range(20)],
    "alpaca": [{"instruction": "say", "input": f"{i}", "output": f"{i}{i}"} for i in range(20)],
    "chat": [
        {"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": f"{i}"}]} for i in range(20)
    ],
    "mood": [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(20)],
}  # fmt: skip


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("copy", "alpaca", "mood"):
        write(tmp_path / "data", f"{name}.jsonl", ROWS[name])
    write(tmp_path / "data", "copy_test.jsonl", ROWS["copy"][:4])
    (tmp_path / "data" / "notes.txt").write_text("not data")
    return tmp_path


def test_three_commands(cli: Cli, place: Path) -> None:
    write_base(place / "base")
    made = cli("init", "data", "--base", "base", "--out", "mine.yaml")
    assert made.code == 0, made.err
    assert "copy: prompt and response, from data/copy.jsonl; held out: data/copy_test.jsonl" in made.out
    assert "alpaca: instruction and output (Alpaca)" in made.out and "mood: text and label" in made.out
    steps = ["train.max_steps=2", "train.epochs=null", "eval.max_new_tokens=2"]
    trained = cli("train", "mine.yaml", *steps)
    assert trained.code == 0, trained.err
    scores = Run.find("runs/mine").report["scores"]
    assert {(row["task"], row["count"]) for row in scores if row["mode"] == "gate"} == {
        ("alpaca", 2),
        ("copy", 4),
        ("mood", 2),
    }
    assert cli("export", "runs/mine", "--expert", "expert_0", "--out", "lora").code == 0
    assert PeftConfig.from_pretrained("lora").peft_type == "LORA"


def test_the_recipe_is_valid_and_is_not_overwritten(cli: Cli, place: Path) -> None:
    assert cli("init", "data", "--base", "molora/tiny").code == 0
    text = Path("recipe.yaml").read_text()
    config = load_recipe("recipe.yaml")
    assert config.adapter.num_experts == 3 and config.adapter.router is not None and config.name == "recipe"
    assert (
        config.data.tasks["mood"].kind == "classification"
        and config.data.tasks["copy"].prompt == "{prompt}\n"
    )
    refused = cli("init", "data", "--base", "molora/tiny")
    assert refused.code == 2 and "is there already" in refused.err and Path("recipe.yaml").read_text() == text
    assert cli("init", "data/copy.jsonl", "--base", "x", "--force").code == 0
    assert load_recipe("recipe.yaml").adapter.gate.select == "top_k"


@pytest.mark.parametrize(
    ("architecture", "kind", "head"),
    [
        ("BertModel", "SEQ_CLS", "match"),
        ("LlamaForCausalLM", "CAUSAL_LM", "own"),
        ("GPT2LMHeadModel", "CAUSAL_LM", "own"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", "own"),
    ],
)
def test_a_local_base_says_what_it_is(
    cli: Cli, tmp_path: Path, architecture: str, kind: str, head: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    write(tmp_path / "data", "a.jsonl", ROWS["mood" if kind == "SEQ_CLS" else "copy"])
    out = tmp_path / "r.yaml"
    assert cli("init", str(tmp_path / "data"), "--base", str(tmp_path / "base"), "--out", str(out)).code == 0
    base = load_recipe(out).base
    assert (base.task_type, base.head) == (kind, head)


def test_a_classifier_of_several_tasks_is_validated(cli: Cli, place: Path) -> None:
    """The label shown is the task's own, whatever class it has in the head that all tasks share."""
    base = {"model": "base", "task_type": "SEQ_CLS", "head": "match"}
    write_encoder(place / "base")
    write(place / "both", "mood.jsonl", ROWS["mood"])
    write(
        place / "both",
        "size.jsonl",
        [{"text": f"t {i}", "label": "big" if i % 2 else "small"} for i in range(20)],
    )
    assert cli("init", "both", "--base", "base").code == 0
    assert load_recipe("recipe.yaml").base.model_dump(include=set(base)) == base
    result = cli("validate", "recipe.yaml")
    assert result.code == 0, result.err
    assert "→ small (class 3)" in result.out or "→ big (class 2)" in result.out


def test_layouts() -> None:
    for rows, name in (
        ([{"messages": []}], "a conversation"),
        (ROWS["chat"], "a conversation"),
        ([{"instruction": "a", "output": "b"}], "instruction and output (Alpaca)"),
        ([{"question": "a", "answer": "b"}], "question and answer"),
        ([{"sentence": "a", "category": "b"}], "sentence and category"),
    ):
        assert layout_of(rows, "x").name == name
    with pytest.raises(DataError, match="x: the fields a, b are of no known kind of record"):
        layout_of([{"a": 1, "b": 2}], "x")


def test_what_is_no_data_is_refused(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder or file"):
        recognise(tmp_path / "none")
    with pytest.raises(DataError, match="holds no data file"):
        recognise(tmp_path)
    write(tmp_path, "a_test.jsonl", ROWS["copy"])
    with pytest.raises(DataError, match="without training records"):
        recognise(tmp_path)
    write(tmp_path, "a.jsonl", ROWS["copy"])
    write(tmp_path, "a_train.jsonl", ROWS["copy"])
    result = cli("init", str(tmp_path), "--base", "x", "--out", str(tmp_path / "r.yaml"))
    assert result.code == 3 and "are both the train records of task 'a'" in result.err
    assert not (tmp_path / "r.yaml").exists()


def test_train_and_test_alone_are_one_task(tmp_path: Path) -> None:
    write(tmp_path / "news", "train.jsonl", ROWS["mood"])
    write(tmp_path / "news", "test.jsonl", ROWS["mood"])
    (found,) = recognise(tmp_path / "news")
    assert (found.task, found.train.name, found.eval and found.eval.name) == (
        "news",
        "train.jsonl",
        "test.jsonl",
    )


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": [1]},
        {"a": 1},
        {"max_position_embeddings": {"a": 1}},
        {"max_position_embeddings": 2},
        [],
    ],
)
def test_odd_configs_of_a_base_and_odd_places(cli: Cli, place: Path, config: Any) -> None:
    (place / "odd").mkdir()
    (place / "odd" / "config.json").write_text(json.dumps(config))
    assert cli("init", "data", "--base", "odd").code == 0
    assert load_recipe("recipe.yaml").data.max_length == 256
    assert cli("init", "data", "--base", "odd", "--out", "no/such/r.yaml").code == 2
    assert cli("init", "data", "--base", "odd", "--out", "data", "--force").code == 2
    (place / "data" / "bad.parquet").write_bytes(b"PAR1 no")
    assert cli("init", "data", "--base", "odd", "--force").code == 3

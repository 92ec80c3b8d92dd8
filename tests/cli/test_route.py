"""`molora route`: a line of JSON for each prompt, from options, a file or the standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import molora
from molora import GateConfig, MoLoraConfig
from molora.assets import tiny_path
from tests.cli.conftest import Cli

WORDS = ("abc", "house", "tree", "xyz", "hello", "word", "rain", "blue")


def adapter(folder: Path, *, taught: bool) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    config = MoLoraConfig(
        num_experts=2,
        r=2,
        target_modules=["q_proj"],
        gate=GateConfig(scope="task"),
        tasks=["shout", "spell"],
        router="gaussian",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    if taught:
        tokenizer = AutoTokenizer.from_pretrained(tiny_path())
        prompts = {task: [f"{task}({word})=" for word in WORDS] for task in ("shout", "spell")}
        molora.fit_router(model, tokenizer, prompts)
    return molora.save(model, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("saved") / "taught", taught=True)


def test_prompts_come_from_options_a_file_and_the_standard_input(
    saved: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("shout(new)=\n\nspell(ü)=\n", encoding="utf-8")
    result = cli("route", saved, "--prompt", "spell(one)=", "--file", tmp_path / "prompts.txt")
    assert result.code == 0
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["prompt"], row["task"]) for row in rows] == [
        ("spell(one)=", "spell"),
        ("shout(new)=", "shout"),
        ("spell(ü)=", "spell"),
    ]
    assert all(set(row) == {"prompt", "task", "posteriors", "log_density"} for row in rows)
    assert all(list(row["posteriors"]) == ["shout", "spell"] for row in rows)
    monkeypatch.setattr("sys.stdin", io.StringIO("shout(in)=\n"))
    assert json.loads(cli("route", saved, "--file", "-").out)["task"] == "shout"


def test_what_cannot_be_named_is_said(saved: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("route", saved).err.startswith("ConfigError: no prompt.")
    missing = cli("route", saved, "--file", tmp_path / "nothing")
    assert missing.code == 3 and "cannot be read as UTF-8 text" in missing.err
    untaught = cli("route", adapter(tmp_path / "new", taught=False), "--prompt", "shout(a)=")
    assert untaught.code == 2 and "has learned no task yet" in untaught.err

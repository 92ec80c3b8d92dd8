"""`molora fuse`: folders in, one LoRA out, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from molora.disk.manifest import verify_folder
from tests.cli.conftest import Cli
from tests.training.runs import write_base
from tests.zoo import base_model


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    for name, rank in (("a", 2), ("b", 3)):
        lora = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base_model("llama"), lora).save_pretrained(root / name)
    return root


def test_it_writes_a_lora_and_says_what(cli: Cli, loras: Path, tmp_path: Path) -> None:
    given = [f"a={loras / 'a'}", f"b={loras / 'b'}"]
    done = cli("fuse", *given, "--out", tmp_path / "f")
    assert (done.code, done.out) == (0, f"2 experts by linear: 2 layers, rank 5\nLoRA: {tmp_path / 'f'}\n")
    verify_folder(tmp_path / "f")
    done = cli("fuse", *given, "--out", tmp_path / "f", "--method", "ties", "--density", "0.5", "--rank", "2",
               "--weight", "a=0.7", "--weight", "b=-0.3")  # fmt: skip
    assert done.code == 0 and "rank 2, " in done.out and "% of the norm cut off" in done.out
    facts = json.loads((tmp_path / "f" / "fusion.json").read_text())
    assert [s["weight"] for s in facts["sources"]] == [0.7, -0.3]
    assert facts["settings"] == {"density": 0.5, "sign": "total"}


def test_one_alone_is_said_to_be_no_fusion(cli: Cli, loras: Path, tmp_path: Path) -> None:
    done = cli("fuse", f"a={loras / 'a'}", "--out", tmp_path / "f")
    assert done.code == 0 and "so nothing is fused" in done.err
    assert done.out.startswith("1 expert by linear: 2 layers, rank 2\n")


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["--weight", "a"], 2, "NAME=WEIGHT"),
        (["--weight", "a=much"], 2, "no number"),
        (["--rank", "many"], 2, "whole number"),
        (["--method", "tie"], 2, "Did you mean 'ties'"),
        (["--expert", "a=x"], 2, "one ordinary LoRA"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(
    cli: Cli, loras: Path, tmp_path: Path, given: list[str], code: int, words: str
) -> None:
    done = cli("fuse", f"a={loras / 'a'}", f"b={loras / 'b'}", "--out", tmp_path / "f", *given)
    assert (done.code, words in done.err) == (code, True), done.err
    assert not (tmp_path / "f").exists()


def test_the_base_is_asked_where_it_is_named(cli: Cli, loras: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    done = cli("fuse", f"a={loras / 'a'}", "--base", tmp_path / "base", "--out", tmp_path / "f")
    assert done.code == 4 and "does not fit this base" in done.err

"""`molora validate`: numbered checks, cheapest first, with what the loss will read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Cli, fresh
from tests.training.runs import recipe_for, write_base

QUICKSTART = str(ROOT / "recipes/quickstart.yaml")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe_for(base, tmp_path / "runs")), encoding="utf-8")  # JSON is YAML
    return path


def test_the_quickstart_passes_every_check(cli: Cli) -> None:
    result = cli("validate", QUICKSTART)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    numbered = [line for line in lines if line[0].isdecimal()]
    assert [line.split()[:2] for line in numbered] == [
        ["1", "schema"], ["2", "data"], ["3", "tokenizer"], ["4", "records"], ["5", "targets"], ["6", "parameters"]
    ]  # fmt: skip
    assert "42 layers; the router reads after block 2 of 6, in a pass of its own" in numbered[4]
    once = cli("validate", QUICKSTART, "adapter.router={kind: gaussian, passes: 1}").out
    assert "28 layers; the router reads after block 2 of 6, in the model's own forward" in once
    records = [line for line in lines if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in records] == [
        t for t in ("pig", "mirror", "zigzag", "back") for _ in "123"
    ]
    mirror = next(line for line in records if "mirror(" in line)
    prompt, target = mirror.split("  mirror: ")[1].split("   [")[0].split(" → ")
    word = prompt.split("(")[1].removesuffix(")=")
    assert target == f"{word}{word[::-1]}<eos>"
    assert f"{len(target) - len('<eos>') + 1} learned tokens]" in mirror  # one token a letter, and the end


def test_the_schema_alone_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from molora.cli.main import main
try:
    main(["validate", {QUICKSTART!r}, "--schema-only"])
finally:
    print(*{{"torch", "transformers", "numpy"}} & sys.modules.keys(), "end")
"""
    done = fresh(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"1 schema      ok: {QUICKSTART}\nend\n"


def test_overrides_are_checked_too(cli: Cli) -> None:
    result = cli("validate", QUICKSTART, "train.lrr=1", "adapter.gate={kind: top_k, top_k: 9}")
    assert (result.code, result.out) == (2, "")
    assert "override 'train.lrr=1'  train.lrr: not a setting. Did you mean 'lr'?" in result.err
    assert "9 is more than num_experts = 4." in result.err


def test_cut_records_are_counted(cli: Cli, recipe: Path) -> None:
    result = cli("validate", str(recipe), "data.max_length=8")
    assert result.code == 0
    assert " cut: " in result.out


def test_a_target_that_matches_nothing_is_refused_with_candidates(cli: Cli, recipe: Path) -> None:
    result = cli("validate", str(recipe), "adapter.target_modules=[q_porj]")
    assert result.code == 2
    assert "5 targets" not in result.out
    assert "q_porj" in result.err
    assert "q_proj" in result.err


def test_a_broken_record_is_refused_by_line(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "law.jsonl"
    data.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a", "tar')
    task = f"data.tasks.law={{source: jsonl, train: {data}}}"
    result = cli("validate", str(recipe), task)
    assert result.code == 3
    assert f"{data}:2" in result.err
    assert "2 data" not in result.out


def test_a_base_out_of_reach_skips_what_needs_it(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    result = cli("validate", str(recipe), f"base={tmp_path / 'absent'}")
    assert result.code == 0
    assert "3 tokenizer   skipped, and all that needs the base: base.model: cannot load" in result.out


def test_nothing_is_written(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    before = sorted(recipe.parent.rglob("*"))
    assert cli("validate", str(recipe)).code == 0
    assert sorted(recipe.parent.rglob("*")) == before

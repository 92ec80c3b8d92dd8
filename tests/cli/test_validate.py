"""`molora validate`: numbered checks, cheapest first, with what the loss will read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from molora.training.train import train
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
        ["1", "schema"], ["2", "data"], ["3", "tokenizer"], ["4", "records"], ["5", "lengths"], ["6", "targets"],
        ["7", "parameters"], ["8", "memory"],
    ]  # fmt: skip
    assert "42 layers; the router reads after block 2 of 6, in a pass of its own" in numbered[5]
    once = cli("validate", QUICKSTART, "adapter.router={kind: gaussian, passes: 1}").out
    assert "28 layers; the router reads after block 2 of 6, in the model's own forward" in once
    records = [line for line in lines if " → " in line]
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
    result = cli("validate", str(recipe), "data.max_length=16")
    assert result.code == 0
    assert " cut: " in result.out
    warned = "task 'reverse', train: 13 prompts lose their beginning (100.0 %) at max_length 16"
    assert warned in result.out  # as training warns


def test_a_target_that_matches_nothing_is_refused_with_candidates(cli: Cli, recipe: Path) -> None:
    result = cli("validate", str(recipe), "adapter.target_modules=[q_porj]")
    assert result.code == 2
    assert "6 targets" not in result.out
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


DAYS = [
    ("a sunny day", "joy"),
    ("a wet day", "sad"),
    ("a sunny  Day", "joy"),
    ("a sunny day", "sad"),
    ("fog", "sad"),
]


def labelled(file: Path) -> str:
    """A task of five records; two are one, and one contradicts them."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in DAYS]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def test_what_is_odd_about_records_is_said(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    file = labelled(tmp_path / "mood.jsonl")
    task = f"{{source: jsonl, kind: classification, train: {file}, eval: {file}}}"
    result = cli("validate", str(recipe), f"data.tasks.mood={task}")
    assert result.code == 0
    said = [line.strip() for line in result.out.splitlines() if line.startswith("  mood:")]
    assert said[:5] == [
        "mood: 1 of 5 training records are there twice",
        "mood: training prompts with more than one answer: 1",
        "mood: 5 of 5 held-out prompts (100 %) are trained on: scores will be too good",
        "mood: labels: joy 2, sad 3",
        "mood: always saying 'sad' would be right for 60.0 % of what is held out",
    ]
    nothing = cli(
        "validate", str(recipe), f"data.tasks.mood={{source: jsonl, kind: classification, train: {file}}}"
    )
    assert "mood: no held-out records, so it will not be scored: `eval: 0.1` holds out a tenth" in nothing.out


@pytest.mark.slow
def test_time_is_measured_in_real_steps(cli: Cli, recipe: Path) -> None:
    out = cli("validate", str(recipe), "--time").out
    assert re.search(r"\d+\.\d\d s a step here, the median of 3: \d+:\d\d:\d\d for 8 steps", out)
    assert not (recipe.parent / "runs").exists()


IN_TURNS = {
    "each task its expert": ("continual_quickstart", [], "800 steps in 10 turns"),
    "one expert for all": ("continual_quickstart", ["continual.strategy=replay"], "800 steps in 10 turns"),
    "all at once": ("continual_quickstart", ["continual.strategy=joint"], "800 steps"),
    "by epochs": (
        "continual_quickstart",
        ["continual.strategy=inc_lora", "train.max_steps=null", "train.epochs=2", "train.batch_size=100"],
        "400 steps in 10 turns",
    ),
    "stages": ("stages", [], "200 steps in 3 turns"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in ("all at once", "by epochs") else ())
        for case in IN_TURNS
    ],
)
def test_memory_and_time_of_a_recipe_in_turns(cli: Cli, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, overrides, length = IN_TURNS[case]
    monkeypatch.setattr("molora.training.timing.MEASURED", 1)
    result = cli("validate", str(ROOT / f"recipes/{name}.yaml"), "--time", *overrides)
    assert result.code == 0, result.err
    assert re.search(r"8 memory +\d+\.\d MB for a batch", result.out)
    assert re.search(rf"for {length}(, as long as in the first)?, evaluation not counted", result.out)


def test_memory_of_a_gate_that_reads_clusters(cli: Cli) -> None:
    out = cli("validate", str(ROOT / "recipes/instruction_clusters.yaml")).out
    assert re.search(r"8 memory +\d+\.\d MB for a batch", out)


def test_a_growth_leaves_its_kind_to_the_run(cli: Cli, tmp_path: Path) -> None:
    file = labelled(tmp_path / "mood.jsonl")
    growth = tmp_path / "growth.yaml"
    growth.write_text(
        f'task: {{name: mood, source: jsonl, text: "{{text}}", train: {file}}}\n', encoding="utf-8"
    )
    result = cli("validate", str(growth))
    assert result.code == 0
    assert "  mood: labels: joy 2, sad 3" in result.out.splitlines()


@pytest.mark.slow
def test_a_growth_is_checked_with_its_run(cli: Cli, base: Path, tmp_path: Path) -> None:
    run = train(recipe_for(base, tmp_path, max_steps=1))
    growth = tmp_path / "growth.yaml"
    task = "{name: loud, source: synthetic, generator: loud, train_size: 20, eval_size: 4}"
    growth.write_text(f"task: {task}\ntrain: {{max_steps: 2}}\n", encoding="utf-8")
    result = cli("validate", str(growth), "--run", str(run.path))
    assert result.code == 0 and "3 tasks" in result.out and "8 memory" in result.out
    growth.write_text(f"task: {task.replace('name: loud', 'name: copy')}\n", encoding="utf-8")
    assert cli("validate", str(growth), "--run", str(run.path)).code == 2

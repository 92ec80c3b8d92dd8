"""`--out` of export, compose and eval deletes nothing, and says so before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

import molora
from molora.store.runs import load_run
from molora.training.train import train
from tests.cli.conftest import Cli, Result
from tests.training.runs import recipe_for, write_base

Door = Callable[[Path | str], Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run trained on it, and a LoRA that PEFT saved."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    train(recipe_for(folder / "base", folder / "runs", max_steps=1))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        folder / "lora"
    )
    return folder


@pytest.fixture(params=["export", "compose", "eval"])
def door(request: pytest.FixtureRequest, place: Path, cli: Cli) -> Door:
    if request.param == "export":
        return lambda out: cli(
            "export", str(place / "runs" / "small"), "--expert", "expert_1", "--out", str(out)
        )
    if request.param == "eval":
        return lambda out: cli("eval", str(place / "runs" / "small"), "--mode", "base", "--out", str(out))
    return lambda out: cli("compose", str(place / "base"), f"a={place / 'lora'}", "--out", str(out))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refused(door: Door, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | str, Path, str], None]:
    for name in ("models.build.load_base", "models.build.load_trained", "training.evaluate.load_trained"):
        monkeypatch.setattr(f"molora.{name}", lambda *_, **__: pytest.fail("a model is loaded"))

    def check(out: Path | str, around: Path, words: str) -> None:
        before = files(around)
        result = door(out)
        assert result.code == 2 and words in result.err and "hint:" in result.err, result.err
        assert files(around) == before

    return check


Refused = Callable[[Path | str, Path, str], None]


def test_a_folder_of_models_stays(refused: Refused, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "weights").write_text(name)
    refused(tmp_path / "models", tmp_path, "holds what molora did not write, and")
    refused(tmp_path / "models", tmp_path, "one/, two/.")


def test_the_working_folder_stays(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    monkeypatch.chdir(tmp_path / "work")
    refused(".", tmp_path, "is the working folder")
    refused("..", tmp_path, "holds the working folder")


def test_links_and_files_stay(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "link", tmp_path, "is a symbolic link")
    refused(tmp_path / "file", tmp_path, "is a file, not a folder")
    assert (tmp_path / "link").is_symlink()


def test_the_sources_stay(refused: Refused, place: Path, request: pytest.FixtureRequest) -> None:
    run = load_run(place / "runs" / "small")
    if "eval" in request.node.name:
        sources = (run.path,)
    elif "export" in request.node.name:
        sources = (run.path, run.adapter, place / "runs", place / "runs" / "small")
    else:
        sources = (place / "base", place / "lora")
    for source in sources:
        refused(source, place, "the source")
    refused(place, place, "holds the source")


def test_an_adapter_folder_is_not_replaced_by_its_own_export(place: Path, cli: Cli, tmp_path: Path) -> None:
    adapter = load_run(place / "runs" / "small").adapter
    before = files(place)
    for out in (adapter, adapter.parent):
        result = cli("export", str(adapter), "--expert", "expert_1", "--out", str(out))
        assert result.code == 2 and "the source" in result.err, result.err
    assert files(place) == before


def test_new_and_empty_folders_and_our_own_are_written(door: Door, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty", tmp_path / "new"):
        assert door(out).code == 0
        if (out / "report.json").exists():
            assert (out / "report.html").is_file()
            continue
        assert PeftConfig.from_pretrained(str(out)).peft_type in ("LORA", "MOLORA")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new"]


def test_a_hub_name_is_no_folder_of_the_same_name(
    cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Qwen/x` is on the Hub: writing to ./Qwen is fine, so the refusal is that of the loader."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "molora.models.base.load_base", lambda *_: (_ for _ in ()).throw(molora.AdapterError("loader"))
    )
    result = cli("compose", "Qwen/x", f"a={place / 'lora'}", "--out", "Qwen")
    assert "loader" in result.err


def test_an_evaluation_leaves_the_report_of_training(place: Path, cli: Cli) -> None:
    """A whole evaluation used to replace it, and with it the tables of a growth."""
    run = load_run(place / "runs" / "small").path
    own = (run / "report.json").read_bytes()
    for number in (1, 2):
        result = cli("eval", str(run))
        assert result.code == 0 and f"report: {run}/evaluations/{number}/report.html" in result.out
        assert (run / "evaluations" / str(number) / "report.json").is_file()
    assert (run / "report.json").read_bytes() == own


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--fail-under", "95"], "95 is not a share, from 0 to 1.\n  hint: 95 % is 0.95."),
        (["--fail-under", "nan"], "nan is not a share"),
        (["--fail-under", "copyy=0.5"], "names the task 'copyy'. Did you mean 'copy'?"),
        (["--mode", "gates"], "unknown evaluation mode 'gates'. Did you mean 'gate'?"),
        (["--mode", "gate", "--mode", "gate"], "named twice"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_a_model_is_loaded(
    place: Path, cli: Cli, given: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "molora.training.evaluate.load_trained", lambda *_, **__: pytest.fail("a model is loaded")
    )
    result = cli("eval", str(place / "runs" / "small"), *given)
    assert result.code == 2 and words in result.err, result.err


def test_parts_of_runs_and_other_results_stay(place: Path, cli: Cli, tmp_path: Path) -> None:
    """Another run's adapter was written by molora too."""
    run = load_run(place / "runs" / "small").path
    other = tmp_path / "runs" / "small" / "1"
    shutil.copytree(run, other)
    lora = tmp_path / "lora"
    assert cli("export", str(run), "--expert", "expert_1", "--out", str(lora)).code == 0
    before = files(tmp_path)
    for verb in (
        ["export", "--expert", "expert_1"],
        ["merge", "--expert", "expert_1"],
        ["eval", "--mode", "base"],
    ):
        for out in (other / "adapter", other / "checkpoints" / "step-000001", run / "adapter"):
            result = cli(verb[0], str(run), *verb[1:], "--out", str(out))
            assert result.code == 2 and ("belongs to the run" in result.err or "source" in result.err), (
                result.err
            )
        if verb[0] != "export":
            result = cli(verb[0], str(run), *verb[1:], "--out", str(lora))
            assert result.code == 2 and "holds something else that molora wrote" in result.err
    assert files(tmp_path) == before

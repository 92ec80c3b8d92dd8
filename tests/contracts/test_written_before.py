"""Adapters and runs that an earlier molora wrote: they load, answer, resume and save as they did then.

The folders `tests/fixtures_v1` and `_v2` stand for what users have on their disks. They are never written again: where one of
these tests fails, the code is wrong. `make.py` in each says what its files hold.

Answers are compared bit for bit wherever this machine computes as the one that wrote them does, which a probe tells: the
logits of the bases alone, which no adapter touches, and products in the shapes that experts and gates have. Elsewhere the
last bits of any matmul differ, and answers must agree within 1e-4: other kernels of one library were seen to move a logit by
1.4e-5, and each adapter moves some logit by 0.14 or more (weights that were trained further: 1e-5).
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import molora
from tests.fixtures_v1.probe import digest_of_small_products

HERE = Path(__file__).parents[1] / "fixtures_v1"
LATER = Path(__file__).parents[1] / "fixtures_v2"  # on the same bases
ADAPTERS = sorted(path for folder in (HERE, LATER) for path in (folder / "adapters").iterdir())
every_adapter = pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
BASES: dict[str, Any] = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "molora.json"
# Of the environment, not of the adapter.
ELSEWHERE = ("peft_version", "transformers_version", "base_model_name_or_path", "revision")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are split over threads, which changes their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def read_base(kind: str) -> Any:
    return BASES[kind].from_pretrained(HERE / "bases" / kind).requires_grad_(False).eval()


def base(kind: str = "llama") -> Any:
    """A base of one's own: loading an adapter changes it."""
    return deepcopy(read_base(kind))


def kind_of(adapter: Path) -> str:
    return "bert" if adapter.name == "head" else "llama"


def expected_of(adapter: Path) -> Path:
    return adapter.parents[1] / "expected" / f"{adapter.name}.safetensors"


def answer(model: Any, inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The logits that were kept under that name, `logits` or `logits/TASK`."""
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if "/" in name:
        given["routing_task_ids"] = [name.split("/")[1]] * len(inputs["input_ids"])
    with torch.no_grad():
        logits = model(**given).logits
    return logits[..., : inputs[name].shape[-1]]


def json_of(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def exact() -> bool:
    """Whether this machine computes bit for bit as the one that wrote the fixtures."""
    probe, threads = load_file(HERE / "probe.safetensors"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = probe["left"] @ probe["right"]
        same = [torch.equal(product, probe["product"]), torch.equal(product.softmax(-1), probe["softmax"])]
        pool = load_file(HERE / "bases" / "llama" / "model.safetensors")["lm_head.weight"]
        same.append(digest_of_small_products(pool) == (HERE / "small_products.sha256").read_text().strip())
        for kind in BASES:
            kept = {name.split("/")[1]: value for name, value in probe.items() if name.startswith(kind)}
            logits = answer(base(kind), kept, "logits")
            # Whatever the machine, the base is the one the adapters were made for.
            torch.testing.assert_close(logits, kept["logits"], atol=1e-5, rtol=1e-5)
            same.append(torch.equal(logits, kept["logits"]))
    finally:
        torch.set_num_threads(threads)
    return all(same)


def assert_same(actual: torch.Tensor, kept: torch.Tensor, exact: bool, atol: float = 1e-4) -> None:
    """Bit for bit where the machine allows it."""
    if exact:
        assert torch.equal(actual, kept), f"differs by up to {(actual - kept).abs().max():.2e}"
    else:
        torch.testing.assert_close(actual, kept, atol=atol, rtol=atol)


def assert_answers(model: Any, expected: Path, exact: bool) -> None:
    """Every answer that was kept in that file."""
    kept = load_file(expected)
    names = [name for name in kept if name.startswith("logits")]
    assert names
    for name in names:
        assert_same(answer(model, kept, name), kept[name], exact)


def settings_of(file: Path) -> dict[str, Any]:
    """The content of a JSON file; PEFT names a classifier's heads once more at every load."""
    settings = json_of(file)
    if settings.get("modules_to_save"):
        settings["modules_to_save"] = sorted(set(settings["modules_to_save"]))
    return settings


def assert_same_adapter(now: Path, then: Path) -> None:
    """The tensors and settings of both folders are equal, but for what is of the environment."""
    written, kept = load_file(now / WEIGHTS), load_file(then / WEIGHTS)
    assert written.keys() == kept.keys()
    assert [name for name in kept if not torch.equal(written[name], kept[name])] == []
    assert {name: value.dtype for name, value in written.items()} == {n: v.dtype for n, v in kept.items()}
    for file, left_out in ((CONFIG, ELSEWHERE), (FACTS, ("versions", "base_model"))):
        new, old = settings_of(now / file), settings_of(then / file)
        assert new.keys() == old.keys()
        assert [key for key in old if key not in left_out and new[key] != old[key]] == []
    for key in ("tasks", "task_ids", "rank_pattern", "alpha_pattern", "always_on"):  # their order counts
        new, old = json_of(now / CONFIG)[key], json_of(then / CONFIG)[key]
        assert list(new or ()) == list(old or ())


@every_adapter
def test_an_adapter_answers_as_it_did(folder: Path, exact: bool) -> None:
    model = molora.load(base(kind_of(folder)), folder)
    assert_answers(model, expected_of(folder), exact)


@pytest.mark.parametrize(
    "folder",
    [HERE / "adapters" / name for name in ("top2", "task_grown", "head")]
    + [LATER / "adapters" / name for name in ("router_gaussian", "virtual_tokens", "trained_tokens")],
    ids=lambda path: path.name,
)
def test_peft_loads_it_too(folder: Path, exact: bool) -> None:
    model = PeftModel.from_pretrained(base(kind_of(folder)), folder)
    assert_answers(model.eval(), expected_of(folder), exact)


@every_adapter
def test_an_adapter_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    molora.save(molora.load(base(kind_of(folder)), folder), tmp_path / "again")
    assert_same_adapter(tmp_path / "again", folder)


@every_adapter
def test_an_adapter_goes_on_learning_what_it_learned(folder: Path) -> None:
    model = molora.load(base(kind_of(folder)), folder, is_trainable=True)
    stored = json_of(folder / CONFIG)
    frozen = stored["frozen_experts"]
    assert model.expert_names == stored["expert_names"] and model.task_ids == stored["task_ids"]
    assert model.trainable_experts == [expert for expert in stored["expert_names"] if expert not in frozen]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == json_of(folder.parents[1] / "expected" / "trainable.json")[folder.name]


ROUTES = json_of(LATER / "expected" / "routes.json")


@pytest.mark.parametrize("name", ROUTES["named"])
def test_a_router_names_tasks_as_it_did(name: str) -> None:
    model = molora.load(base(), LATER / "adapters" / name)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "bases" / "llama")
    for now, then in zip(
        molora.route(model, tokenizer, ROUTES["prompts"]), ROUTES["named"][name], strict=True
    ):
        assert now.task == then["task"]
        assert now.posteriors == pytest.approx(then["posteriors"], abs=1e-4)
        assert now.log_density == pytest.approx(then["log_density"], rel=1e-4)


# -- runs: their recipes name the base by a path from the repository's root ------------------------------------------

SEQUENCES = ("color", "gated")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(HERE.parents[1])
    return HERE.parents[1]


def sequence(name: str) -> Any:
    return molora.load_run(HERE / "sequences" / name)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / "run")
    return to / "run"


def scores(run: Path) -> dict[str, Any]:
    return json_of(run / "matrix.json")


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_stage_of_a_sequence_answers_as_it_did(name: str, exact: bool) -> None:
    stages = sorted((sequence(name).path / "stages").iterdir())
    assert len(stages) == len(sequence(name).config.data.tasks)
    for stage in stages:
        assert molora.load_run(stage).path == stage and molora.load_run(stage).config.continual is None
        expected = HERE / "expected" / f"{name}-{stage.name}.safetensors"
        assert_answers(molora.load(base(), stage / "adapter"), expected, exact)
    assert_same_adapter(sequence(name).adapter, stages[-1] / "adapter")


def test_the_prototypes_of_a_sequence_name_tasks_as_they_did() -> None:
    kept = json_of(HERE / "expected" / "router.json")
    router, run = molora.load_router(sequence("color")), sequence("color")
    assert router.tasks == list(run.config.data.tasks)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "bases" / "llama")
    assert router(molora.load(base(), run.adapter), tokenizer, kept["prompts"]) == kept["tasks"]


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_finished_sequence_is_scored_as_it_was(name: str, root: Path, tmp_path: Path) -> None:
    run = copied(sequence(name).path, tmp_path)
    mode, matrix = ("task", "shown") if name == "color" else ("gate", "hidden")
    report = molora.evaluate(run, modes=[mode])
    last = scores(run)["matrices"][matrix]["rows"][-1]
    assert [report.score(task, mode).value for task in molora.load_run(run).config.data.tasks] == last


def test_a_finished_sequence_stays_as_it_is(root: Path, tmp_path: Path) -> None:
    run = copied(sequence("color").path, tmp_path)
    before = scores(run)
    molora.train_sequence(run / "config.yaml", resume=run)
    assert scores(run) == before
    assert_same_adapter(run / "adapter", sequence("color").adapter)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_goes_on_from_the_stage_before_the_last(
    name: str, root: Path, tmp_path: Path, exact: bool
) -> None:
    whole, run = sequence(name).path, copied(sequence(name).path, tmp_path)
    shutil.rmtree(sorted((run / "stages").iterdir())[-1])
    shutil.rmtree(run / "adapter")
    molora.train_sequence(run / "config.yaml", resume=run)
    assert_same_weights(run / "adapter" / WEIGHTS, whole / "adapter" / WEIGHTS, exact)
    if exact:
        assert scores(run) == scores(whole)


def test_an_interrupted_run_ends_as_the_one_that_ran_through(tmp_path: Path, exact: bool) -> None:
    finished = molora.load_run(HERE / "training" / "finished")
    run = copied(molora.load_run(HERE / "training" / "interrupted").path, tmp_path)
    assert [step.name for step in molora.load_run(run).checkpoints] == ["step-000004"]
    done = molora.train(run / "config.yaml", resume=run)
    assert done.path == run
    assert_same_weights(run / "adapter" / WEIGHTS, finished.adapter / WEIGHTS, exact)
    assert done.report is not None and finished.report is not None
    assert done.report.keys() >= finished.report.keys()
    if exact:
        assert done.report["scores"] == finished.report["scores"]


def assert_same_weights(now: Path, then: Path, exact: bool) -> None:
    """Weights that were trained here: every rounding on the way counts."""
    written, kept = load_file(now), load_file(then)
    assert written.keys() == kept.keys()
    for name, value in kept.items():
        assert_same(written[name], value, exact, atol=1e-5)

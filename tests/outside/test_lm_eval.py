"""lm-eval reads an adapter folder as any PEFT folder, also where it resizes the base's vocabulary first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.cli.main import main
from molora.errors import RoutingError
from molora.store.lora_export import export_lora
from molora.training.lm_eval import evaluate_with_lm_eval
from tests.outside.bases import GATES, base, mixture, tokenizer
from tests.training.runs import recipe_for, write_base

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install molora[lm-eval]")
pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": "one and two are", "choices": [" three", " ten"], "answer": 0},
    {"question": "the colour of the sky is", "choices": [" a horse", " blue"], "answer": 1},
    {"question": "to be or not to", "choices": [" be", " see", " run"], "answer": 0},
    {"question": "up or", "choices": [" down", " out"], "answer": 0},
]
CHOICE = """
task: molora_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
target_delimiter: ""
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
WRITE = """
task: molora_write
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
target_delimiter: ""
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def trained(gate: str, vocab: int = 259) -> Any:
    """A mixture on a base of that many tokens, whose experts change what it says."""
    from peft import get_peft_model

    from tests.outside.bases import config

    torch.manual_seed(1)
    model = get_peft_model(base(vocab), config(gate)) if vocab != 259 else mixture(gate)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "molora_gate" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def base_folder(model: Any, folder: Path) -> Path:
    """The base of a model with its tokenizer, as a folder that lm-eval can load."""
    base(model.get_base_model().config.vocab_size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def evaluated(folder: Path, **settings: Any) -> dict[str, Any]:
    """What lm-eval's samples say on both tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tasks / "choice.yaml").write_text(CHOICE % json.dumps(str(data)))
    (tasks / "write.yaml").write_text(WRITE % json.dumps(str(data)))
    model = HFLM(**{"device": "cpu", "dtype": "float32", "batch_size": 2, "max_length": 64, **settings})
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model,
        tasks=["molora_choice", "molora_write"],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }


def log_likelihoods(model: Any, **routed: Any) -> list[list[float]]:
    """The same by hand: summed log-probability of each choice after its question."""
    tokens, rows = tokenizer(), []
    for row in QUESTIONS:
        rows.append([])
        prompt = tokens(row["question"]).input_ids
        for choice in row["choices"]:
            whole = tokens(row["question"] + choice).input_ids
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([whole[:-1]]), **routed).logits.log_softmax(-1)[0]
            places = range(len(prompt) - 1, len(whole) - 1)
            rows[-1].append(sum(scores[i, whole[i + 1]].item() for i in places))
    return rows


def close(found: dict[str, Any], expected: list[list[float]]) -> bool:
    flat = [float(choice[0][0]) for sample in found["molora_choice"] for choice in sample]
    return flat == pytest.approx([value for row in expected for value in row], abs=1e-3)


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_an_adapter_folder_evaluates_as_the_model_itself(tmp_path: Path, gate: str) -> None:
    model = trained(gate)
    model.save_pretrained(tmp_path / "adapter")
    where = base_folder(model, tmp_path / "base")
    batch = 1 if gate == "sequence" else 2  # lm-eval pads batches and passes no mask
    found = evaluated(tmp_path, pretrained=str(where), peft=str(tmp_path / "adapter"), batch_size=batch)
    assert close(found, log_likelihoods(model))
    assert not close(found, log_likelihoods(base().eval()))


def test_padded_batches_without_a_mask_are_told_of_where_a_gate_pools_them(tmp_path: Path) -> None:
    model = trained("sequence")
    with pytest.warns(UserWarning, match=r"lm-eval: batch_size=1"):
        evaluated(tmp_path, pretrained=model, tokenizer=tokenizer())


def test_a_base_with_a_padded_vocabulary_that_lm_eval_resizes(tmp_path: Path) -> None:
    """The base has 320 rows, the tokenizer 259 tokens: lm-eval cuts the rows before it puts the adapter on."""
    model = trained("token", vocab=320)
    model.save_pretrained(tmp_path / "adapter")
    where = base_folder(model, tmp_path / "base")
    with pytest.warns(UserWarning, match="has 259 tokens, and had 320"):
        found = evaluated(tmp_path, pretrained=str(where), peft=str(tmp_path / "adapter"))
    model.resize_token_embeddings(259)
    assert close(found, log_likelihoods(model))


def test_a_task_routed_adapter_says_that_it_needs_tasks(tmp_path: Path) -> None:
    model = trained("task")
    model.save_pretrained(tmp_path / "adapter")
    where = base_folder(model, tmp_path / "base")
    with pytest.raises(
        RoutingError, match=r"decides by task id, but no task ids were given\. Tasks: alpha, beta"
    ):
        evaluated(tmp_path, pretrained=str(where), peft=str(tmp_path / "adapter"))


def test_one_task_of_a_task_routed_adapter_by_its_export(tmp_path: Path) -> None:
    """An exported task is a plain LoRA folder, for any harness."""
    model = trained("task")
    where = base_folder(model, tmp_path / "base")
    export_lora(model, tmp_path / "beta", task="beta")
    found = evaluated(tmp_path, pretrained=str(where), peft=str(tmp_path / "beta"))
    assert close(found, log_likelihoods(model, routing_task_ids=["beta"]))


def test_one_task_of_a_task_routed_adapter_in_a_model_that_is_handed_over(tmp_path: Path) -> None:
    """lm-eval takes a model as well: it then runs where the caller says which task is meant."""
    model = trained("task")
    with molora.routing(model, task_ids="beta"):
        found = evaluated(tmp_path, pretrained=model, tokenizer=tokenizer())
    assert close(found, log_likelihoods(model, routing_task_ids=["beta"]))
    assert GATES["task"].scope == "task"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and two tasks of the harness beside it."""
    folder = tmp_path_factory.mktemp("run")
    made = molora.train(recipe_for(write_base(folder / "base"), folder / "runs", max_steps=20))
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "choice.yaml").write_text(CHOICE % json.dumps(str(data)))
    (folder / "tasks" / "write.yaml").write_text(WRITE % json.dumps(str(data)))
    return made.path


def test_the_verb_scores_a_run_by_whoever_decides_and_the_base(run: Path) -> None:
    tasks = run.parents[2] / "tasks"
    names = ["molora_choice", "molora_write"]
    scores, file = evaluate_with_lm_eval(run, names, routes=["copy"], include_path=tasks)
    assert {(s.task, s.metric, s.mode) for s in scores} == {
        (name, metric, mode)
        for name, metric in zip(names, ("acc", "exact_match"), strict=True)
        for mode in ("task copy", "base")
    }
    assert all(score.count == len(QUESTIONS) for score in scores)
    model, tokens = molora.load(run)
    for mode, routed in (("task copy", {"routing_task_ids": ["copy"]}), ("base", {"routing_task_ids": [-1]})):
        right = 0
        for row in QUESTIONS:
            nats = []
            for choice in row["choices"]:
                ids = tokens(row["question"], add_special_tokens=False).input_ids
                whole = tokens(row["question"] + choice, add_special_tokens=False).input_ids
                with torch.no_grad():
                    found = model(input_ids=torch.tensor([whole[:-1]]), **routed).logits.log_softmax(-1)[0]
                nats.append(sum(found[i, whole[i + 1]].item() for i in range(len(ids) - 1, len(whole) - 1)))
            right += nats.index(max(nats)) == row["answer"]
        score = next(s for s in scores if s.task == "molora_choice" and s.mode == mode)
        assert score.value == pytest.approx(right / len(QUESTIONS))
    assert json.loads(file.read_text(encoding="utf-8"))["scores"][0]["task"] == "molora_choice"


def test_the_verb_on_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = str(run.parents[2] / "tasks")
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(run), "--lm-eval", "molora_choice", "--lm-eval-tasks", tasks, "--limit", "2"])
    shown = capsys.readouterr()
    assert stop.value.code == 0, shown.err
    assert all(
        text in shown.out for text in ("molora_choice", "acc", "gate alone", "base only", "lm_eval.json")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lm-eval", "molora_chioce"], "Did you mean 'molora_choice'"),
        (["--lm-eval", "molora_choice", "--task", "cpy"], "Did you mean 'copy'"),
        (["--lm-eval", "molora_choice", "--predictions"], "--predictions has no meaning beside it"),
        (["--lm-eval", " , "], "names no task"),
    ],
)
def test_what_the_verb_refuses(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(run), *words, "--lm-eval-tasks", str(run.parents[2] / "tasks")])
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())

"""Scoring real (tiny) models: every kind of task, every mode, and what is refused."""

from __future__ import annotations

import pytest
import torch

from molora import ConfigError, DataError, routing
from molora.data.tasks import Task
from molora.evaluation.modes import usable_modes
from molora.evaluation.runner import evaluate_tasks, inference
from molora.evaluation.score import Limits
from tests.training.runs import write_base
from tests.zoo import randomise


@pytest.fixture(scope="module")
def tokenizer_and_base(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = write_base(tmp_path_factory.mktemp("base"))
    return AutoTokenizer.from_pretrained(folder), folder


def build(tokenizer_and_base, gate="top_k", tasks=("a", "b")):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from molora import MoLoraConfig

    base = AutoModelForCausalLM.from_pretrained(tokenizer_and_base[1])
    config = MoLoraConfig(
        num_experts=2,
        r=2,
        target_modules="all-linear",
        gate={"kind": gate},
        tasks=list(tasks),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    randomise(model)
    return model


def task(name, task_id, metric="exact_match", records=None, **more):
    records = records or [{"prompt": f"{name}{i}=", "target": f"x{i}"} for i in range(5)]
    return Task(name, task_id, records, records, metric=metric, **more)


def test_scores_equal_generating_by_hand_in_every_mode(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base).train()
    tasks = [task("a", 0), task("b", 1)]
    answers = {}
    with inference(model):
        for mode, ids in (("gate", None), ("task", "a"), ("base", -1)):
            ids_of = tokenizer("a0=", add_special_tokens=False, return_tensors="pt")
            with routing(model, ids, by="task" if mode == "task" else None):
                out = model.generate(**ids_of, max_new_tokens=3, do_sample=False)
            answers[mode] = tokenizer.decode(out[0, ids_of["input_ids"].shape[1] :], skip_special_tokens=True)
    for mode, answer in answers.items():
        expecting = [task("a", 0, records=[{"prompt": "a0=", "target": answer}])]
        report = evaluate_tasks(model, tokenizer, expecting, modes=[mode], limits=Limits(max_new_tokens=3))
        assert report.score("a", mode).value == 1.0
    report = evaluate_tasks(model, tokenizer, tasks, limits=Limits(batch_size=2, max_new_tokens=3))
    assert report.modes == ["gate", "task", "base"] and report.score("a", "gate").count == 5
    assert report.routing.mode == "gate" and set(report.routing.by_task) == {"a", "b"}
    assert sum(report.routing.by_task["a"].values()) == pytest.approx(1.0)
    assert model.training, "training mode is restored"


def test_loss_is_the_models_own_loss(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base).eval()
    record = {"prompt": "ab", "target": "cde"}
    report = evaluate_tasks(model, tokenizer, [task("a", 0, "loss", [record])], modes=["gate"])
    ids = tokenizer("abcde", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    labels = [-100, -100, *ids[2:]]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert report.score("a", "gate").value == pytest.approx(expected.item(), rel=1e-5)


def test_labels_written_by_a_language_model_are_matched(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base)
    records = [{"text": "one", "label": "yes"}, {"text": "two", "label": 1}]
    classified = task(
        "a", 0, "accuracy", records, kind="classification", labels=("yes", "no"), task_type="CAUSAL_LM"
    )
    report = evaluate_tasks(model, tokenizer, [classified], modes=["gate"], limits=Limits(max_new_tokens=3))
    assert report.score("a", "gate").value in (0.0, 0.5, 1.0) and report.score("a", "gate").count == 2


def test_a_task_gate_skips_the_mode_it_cannot_run(tokenizer_and_base):
    model = build(tokenizer_and_base, gate="task")
    modes, notes = usable_modes(model, ["gate", "task", "base"])
    assert modes == ["task", "base"] and "routes by task id" in notes[0]
    with pytest.raises(ConfigError, match="no evaluation mode is left"):
        usable_modes(model, ["gate"])
    with pytest.raises(ConfigError, match="Did you mean 'task'"):
        usable_modes(model, ["tsk"])


def test_unknown_tasks_and_empty_tasks_are_refused(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base)
    with pytest.raises(ConfigError, match=r"unknown task 'c'.*Known tasks: a, b"):
        evaluate_tasks(model, tokenizer, [task("c", 2)])
    with pytest.raises(DataError, match="no held-out records"):
        evaluate_tasks(model, tokenizer, [Task("a", 0, [{"prompt": "x", "target": "y"}])], modes=["gate"])

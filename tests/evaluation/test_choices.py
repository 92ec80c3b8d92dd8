"""Metrics `likelihood` and `likelihood_norm`: multiple choice and labels by what a language model finds likeliest."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

import molora
from molora import ConfigError, DataError
from molora.config import load_recipe
from molora.data.tasks import Task
from molora.evaluation.runner import evaluate_tasks
from molora.evaluation.score import HeldOut, Limits, likeliest
from tests.evaluation.test_runner import build, tokenizer_and_base
from tests.training.runs import recipe_for

__all__ = ["tokenizer_and_base"]

RECORDS = [
    {"prompt": "ab", "choices": ["c", "cde", "dd"], "answer": "cde"},
    {"prompt": "abcab", "choices": ["no", "yes"], "answer": "no"},
    {"prompt": "b", "choices": ["a", "b", "c", "d d d"], "answer": "d d d"},
]


def choosing(metric, records=RECORDS, **more):
    return Task("a", 0, records, records, metric=metric, target=" {answer}", choices="choices", **more)


def by_hand(model, tokenizer, prompt, answer):
    """Nats of an answer and its end, token by token, each from a forward pass of its own."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    nats = 0.0
    for token in [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        nats -= F.log_softmax(logits, dim=-1)[token].item()
        ids = [*ids, token]
    return nats


def test_every_answer_has_the_models_own_likelihood_in_batches_of_any_size(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base).eval()
    for size in (1, 2, 32):
        held_out = HeldOut(model, tokenizer, choosing("likelihood"), Limits(batch_size=size))
        with torch.no_grad():
            answers = held_out.ask(range(3))
        for record, found in zip(RECORDS, (answers[i] for i in range(3)), strict=True):
            expected = [by_hand(model, tokenizer, record["prompt"], f" {text}") for text in record["choices"]]
            assert [nats for nats, _ in found] == pytest.approx(expected, abs=1e-4)
            assert [count for _, count in found] == [len(text) + 2 for text in record["choices"]]


@pytest.mark.parametrize("metric", ["likelihood", "likelihood_norm"])
def test_the_score_is_the_share_of_right_answers_that_are_likeliest(tokenizer_and_base, metric):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base).eval()
    right = 0
    for record in RECORDS:
        nats = {
            text: by_hand(model, tokenizer, record["prompt"], f" {text}")
            / (len(text) + 2 if metric == "likelihood_norm" else 1)
            for text in record["choices"]
        }
        right += min(nats, key=nats.__getitem__) == record["answer"]
    report = evaluate_tasks(model, tokenizer, [choosing(metric)], modes=["gate"])
    assert report.score("a", "gate").value == pytest.approx(right / 3)


def test_a_long_answer_wins_by_the_mean_and_loses_by_the_sum():
    answers = [(2.0, 1), (3.0, 6), (3.0, 2)]
    assert likeliest(answers, "likelihood") == 0
    assert likeliest(answers, "likelihood_norm") == 1
    assert likeliest([(1.0, 1), (1.0, 1)], "likelihood") == 0


def test_labels_of_a_classification_that_a_language_model_writes(tokenizer_and_base):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base).eval()
    records = [{"text": "abc", "label": i % 2} for i in range(4)]
    task = Task("a", 0, records, records, kind="classification", metric="likelihood", labels=("bad", "good"),
                task_type="CAUSAL_LM")  # fmt: skip
    nats = [by_hand(model, tokenizer, "abc", label) for label in task.labels]
    report = evaluate_tasks(model, tokenizer, [task], modes=["gate"])
    said = task.labels[nats.index(min(nats))]
    assert report.score("a", "gate").value == 0.5
    assert [(p.prediction, p.answer) for p in report.predictions] == [
        (said, "bad"), (said, "good"), (said, "bad"), (said, "good"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "' d' is not one of those that 'choices' lists"),
        ({"prompt": "a", "choices": ["b", "b"], "answer": "b"}, "lists an answer twice"),
        ({"prompt": "a", "choices": "b", "answer": "b"}, "must list two texts or more"),
    ],
)  # fmt: skip
def test_records_that_let_nothing_be_chosen(tokenizer_and_base, record, said):
    with pytest.raises(DataError, match=said):
        HeldOut(build(tokenizer_and_base), tokenizer_and_base[0], choosing("likelihood", [record]), Limits())


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match="has 2 fields"):
        Task("a", 0, RECORDS, metric="likelihood", target="{answer}{prompt}", choices="choices")
    with pytest.raises(ConfigError, match="needs a language model"):
        Task("a", 0, RECORDS, kind="classification", labels=("x", "y"), metric="likelihood")
    recipe = recipe_for(tmp_path, tmp_path)
    recipe["data"]["tasks"] = {"a": {"source": "jsonl", "train": "a.jsonl", "metric": "likelihood"}}
    with pytest.raises(ConfigError, match=r"tasks.a.choices: is missing"):
        load_recipe(recipe)


def test_a_recipe_with_choices_trains_and_is_scored_by_them(tokenizer_and_base, tmp_path):
    rows = [{"prompt": f"{i}?", "choices": ["yes", "no"], "answer": ["yes", "no"][i % 2]} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_for(tokenizer_and_base[1], tmp_path, max_steps=1)
    recipe["data"]["tasks"] = {
        "a": {"source": "jsonl", "train": str(tmp_path / "a.jsonl"), "eval": 0.5, "target": "{answer}",
              "choices": "choices"},
    }  # fmt: skip
    report = molora.evaluate(molora.train(recipe), modes=["gate"])
    score = report.score("a", "gate")
    assert (score.metric, score.count) == ("likelihood", 4)
    assert {p.prediction for p in report.predictions} <= {"yes", "no"}

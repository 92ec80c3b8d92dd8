"""pass@k: the estimator, drawn answers, and the command that judges them."""

from __future__ import annotations

import json
import math
import sys
from itertools import combinations

import pytest
import torch

from molora import ConfigError
from molora.config import load_recipe
from molora.config.evaluation import SamplingConfig
from molora.data.tasks import Task
from molora.evaluation.pass_at_k import Judge, pass_at_k
from molora.evaluation.predictions import from_jsonl, to_jsonl
from molora.evaluation.runner import evaluate_tasks
from molora.evaluation.score import HeldOut, Limits
from tests.evaluation.test_runner import build, tokenizer_and_base
from tests.training.runs import recipe_for

__all__ = ["tokenizer_and_base"]

RECORDS = [{"prompt": prompt, "target": "aa", "wanted": "a"} for prompt in ("ab", "ba", "abc")]
CHECK = (  # right is what has the letter that the record names
    "import json, sys; told = json.load(sys.stdin); assert set(told) == {'prompt', 'answer', 'record'}; "
    "sys.exit(told['record']['wanted'] not in told['answer'])"
)


def judged(check: str = CHECK, records=RECORDS) -> Task:
    return Task("a", 0, records, records, metric="pass_at_k", check=(sys.executable, "-c", check))


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (5, 5, 2), (5, 0, 2), (6, 1, 6), (7, 3, 5)]
)
def test_the_estimator_is_the_share_of_all_draws_that_have_a_right_answer(samples, passed, k):
    draws = [*combinations([True] * passed + [False] * (samples - passed), k)]
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_drawn_answers_are_judged_and_the_same_whenever_they_are_drawn(tokenizer_and_base, tmp_path):
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base).eval()
    limits = Limits(
        max_new_tokens=4, seed=3, sampling=SamplingConfig(samples=4, k=2, temperature=2.0, top_p=1.0)
    )
    before = torch.random.get_rng_state()
    first, second = (
        evaluate_tasks(model, tokenizer, [judged()], modes=["gate"], limits=limits) for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    found = first.predictions
    assert found == second.predictions
    assert len({text for one in found for text, _ in one.drawn}) > 3  # they are drawn
    # The space around an answer is the answer's.
    assert any(text != text.strip() for one in found for text, _ in one.drawn)
    for one in found:
        assert [right for _, right in one.drawn] == ["a" in text for text, _ in one.drawn]
        assert one.score == pass_at_k(4, sum(right for _, right in one.drawn), 2)
    assert first.scores[0].value == pytest.approx(math.fsum(one.score for one in found) / 3)
    (tmp_path / "p.jsonl").write_text(to_jsonl(found))
    again = from_jsonl(tmp_path / "p.jsonl")
    assert json.loads(to_jsonl(again).splitlines()[0]) == json.loads(to_jsonl(found).splitlines()[0])


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("import sys; sys.exit('no such thing')", "it ended with 1, saying 'no such thing'."),
        ("import time; time.sleep(60)", "it took longer than 0.5 s."),
    ],
)
def test_a_check_that_finds_a_target_wrong_is_told_of_before_anything_is_drawn(
    tokenizer_and_base, check, said
):
    limits = Limits(sampling=SamplingConfig(timeout=0.5))
    with pytest.raises(ConfigError, match="finds the first record's own target wrong") as error:
        HeldOut(build(tokenizer_and_base).eval(), tokenizer_and_base[0], judged(check), limits)
    assert said in str(error.value)


def test_an_answer_that_takes_too_long_is_wrong_and_a_program_that_is_not_there_an_error():
    slow = "import json, sys, time; time.sleep(60 * ('b' in json.load(sys.stdin)['answer']))"
    judge = Judge(judged(slow), timeout=2.0)
    assert judge.all([(RECORDS[0], "a"), (RECORDS[0], "b")]) == [True, False]
    with pytest.raises(ConfigError, match=r"check /no/such/program cannot be run: No such file or directory"):
        Judge(Task("a", 0, RECORDS, RECORDS, metric="pass_at_k", check=("/no/such/program",)), 1.0)


@pytest.mark.parametrize(
    ("task", "own", "said"),
    [
        ({"metric": "pass_at_k"}, None, r"check: is missing: the command that judges an answer"),
        ({"check": ["python", "x.py"]}, None, r"check: acts only with metric: pass_at_k"),
        ({}, {"samples": 3}, r"eval.sampling: acts only with a task of metric: pass_at_k"),
        ({"metric": "pass_at_k", "check": ["x"]}, {"samples": 3, "k": 4}, r"k: is more than samples = 3"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(tmp_path, task, own, said):
    made = recipe_for(tmp_path, tmp_path / "run")
    for found in made["data"]["tasks"].values():
        found.update(task)
    made["eval"] = {**made.get("eval", {}), **({} if own is None else {"sampling": own})}
    with pytest.raises(ConfigError, match=said):
        load_recipe(made)

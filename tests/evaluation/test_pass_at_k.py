"""pass@k: the estimator, drawn answers, and the command that judges them."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from threading import Thread

import pytest
import torch

from molora import ConfigError, DataError
from molora.config import load_recipe
from molora.config.evaluation import SamplingConfig
from molora.data.tasks import Task
from molora.evaluation.draws import Drawn, Draws
from molora.evaluation.paired import compare
from molora.evaluation.pass_at_k import Judge, pass_at_k
from molora.evaluation.predictions import examples, from_jsonl, to_jsonl
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
        max_new_tokens=4, seed=3, sampling=SamplingConfig(samples=8, k=2, temperature=2.0, top_p=1.0)
    )
    before = torch.random.get_rng_state()
    # Neither what is answered together nor in which order changes what is drawn.
    first, second = (
        evaluate_tasks(
            model, tokenizer, [judged()], modes=["gate"], limits=replace(limits, batch_size=together)
        )
        for together in (32, 5)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    found = first.predictions
    assert found == second.predictions
    assert len({text for one in found for text, _ in one.drawn}) > 3  # they are drawn
    # The space around an answer is the answer's.
    assert any(text != text.strip() for one in found for text, _ in one.drawn)
    for one in found:
        assert [right for _, right in one.drawn] == ["a" in text for text, _ in one.drawn]
        assert one.score == pass_at_k(8, sum(right for _, right in one.drawn), 2)
    assert first.scores[0].value == pytest.approx(math.fsum(one.score for one in found) / 3)
    (tmp_path / "p.jsonl").write_text(to_jsonl(found))
    again = from_jsonl(tmp_path / "p.jsonl")
    assert json.loads(to_jsonl(again).splitlines()[0]) == json.loads(to_jsonl(found).splitlines()[0])
    # What is shown of an answer is what the check said of that answer, and records are compared by what they are worth.
    shown = examples(again, 2)["a"]
    assert {one.right for one in shown} == {True, False}
    assert all(one.right == ("a" in one.prediction) for one in shown)
    worse = [replace(one, score=one.score / 2) for one in found]
    (row,), changed = compare(found, worse)
    assert row.p is None and row.share and row.after == pytest.approx(row.before / 2)
    assert len(changed) == sum(one.score > 0 for one in found)


def test_drawn_tokens_have_their_probabilities():
    """Oracle: evenly spread numbers draw each token as often as its probability says."""
    torch.manual_seed(0)
    count, scores = 10_000, torch.randn(7) * 2
    scores[[0, 4]] = float("-inf")
    numbers = (torch.arange(count) / count).unsqueeze(1)
    left = Drawn(numbers)(torch.zeros(count, 1), scores.expand(count, 7))
    assert (left.isfinite().sum(dim=1) == 1).all()
    drawn = left.argmax(dim=1).bincount(minlength=7) / count
    torch.testing.assert_close(drawn, scores.softmax(dim=0), atol=2e-4, rtol=0)
    assert drawn[0] == drawn[4] == 0


def test_each_step_of_each_answer_has_a_number_of_its_own():
    first, second = (
        Draws(1.0, 1.0, [(3, 0, 0), (3, 0, 1), (4, 0, 0)]).processors(p, 5)[-1] for p in ([0, 1, 2], [2])
    )
    assert len(first.numbers.unique()) == 15
    assert torch.equal(first.numbers[2], second.numbers[0])
    scores = torch.zeros(3, 1000)
    steps = [first(torch.zeros(3, 1), scores).argmax(dim=1) for _ in range(5)]
    torch.testing.assert_close(torch.stack(steps, dim=1) / 1000, first.numbers, atol=1e-3, rtol=0)


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


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has fetched yet has."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def started(folder: Path, count: int) -> list[int]:
    """The processes that wrote their names into `folder`, once there are `count` of them."""
    for _ in range(200):
        if len(found := [int(file.name) for file in folder.iterdir()]) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError("the checks did not start")


CHILD = (  # what a check starts: tells its name, and holds stderr for a minute
    "import json, os, subprocess, sys, time; answer = json.load(sys.stdin)['answer']; answer == 'aa' and sys.exit(); "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "open(os.path.join({folder!r}, str(child.pid)), 'w').close(); "
)
proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@proc
@pytest.mark.parametrize(("then", "right"), [("sys.exit(0)", True), ("time.sleep(60)", False)])
def test_what_a_check_leaves_running_is_ended_and_not_waited_for(tmp_path, then, right):
    judge = Judge(judged(CHILD.format(folder=str(tmp_path)) + then), timeout=3.0)
    start = time.monotonic()
    assert judge.all([(RECORDS[0], "b")]) == [right]
    assert time.monotonic() - start < 30
    assert all(gone(pid) for pid in started(tmp_path, 1))


@proc
def test_an_interrupt_ends_the_checks_that_run(tmp_path):
    judge = Judge(judged(CHILD.format(folder=str(tmp_path)) + "time.sleep(60)"), timeout=60.0)

    def interrupt() -> None:
        started(tmp_path, 1)
        os.kill(os.getpid(), signal.SIGINT)

    # Shells start what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            judge.all([(RECORDS[0], "b")] * 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30
    assert all(gone(pid) for pid in started(tmp_path, 1))


def test_a_check_may_say_as_much_as_it_likes():
    loud = "import sys; [sys.stderr.write('x' * 2**20) for _ in range(64)]; sys.exit('\\nthe end')"
    with pytest.raises(ConfigError, match="it ended with 1, saying 'the end'"):
        Judge(judged(loud), 60.0)
    assert Judge(judged(loud.replace("sys.exit('\\nthe end')", "0")), 60.0).all([(RECORDS[0], "a")]) == [True]


def test_a_record_that_is_no_json_is_told_of():
    with pytest.raises(DataError, match="which it cannot be written as: keys must be str"):
        Judge(judged(records=[{**RECORDS[0], (1, 2): "x"}]), 5.0)


@pytest.mark.parametrize(
    ("command", "said"),
    [("", r"check '' x cannot be run: "), ("a\0b", r"cannot be run: embedded null byte")],
)
def test_a_name_that_is_no_programs_is_shown(command, said):
    with pytest.raises(ConfigError, match=said):
        Judge(Task("a", 0, RECORDS, RECORDS, metric="pass_at_k", check=(command, "x")), 1.0)


@pytest.mark.parametrize(
    ("task", "own", "said"),
    [
        ({"metric": "pass_at_k"}, None, r"check: is missing: the command that judges an answer"),
        ({"check": ["python", "x.py"]}, None, r"check: acts only with metric: pass_at_k"),
        ({}, {"samples": 3}, r"eval.sampling: acts only with a task of metric: pass_at_k"),
        ({"metric": "pass_at_k", "check": ["x"]}, {"samples": 3, "k": 4}, r"k: is more than samples = 3"),
        ({"metric": "pass_at_k", "check": ["x"]}, {"timeout": 1e10}, r"timeout: must be at most 86400"),
        ({"metric": "pass_at_k", "check": ["x"]}, {"temperature": 1e-45}, r"temperature: must be at least 0.01"),
        ({"metric": "pass_at_k", "check": ["", "x"]}, None, r"check.0: names no program"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(tmp_path, task, own, said):
    made = recipe_for(tmp_path, tmp_path / "run")
    for found in made["data"]["tasks"].values():
        found.update(task)
    made["eval"] = {**made.get("eval", {}), **({} if own is None else {"sampling": own})}
    with pytest.raises(ConfigError, match=said):
        load_recipe(made)

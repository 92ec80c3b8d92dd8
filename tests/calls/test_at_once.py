"""Several callers of one model at once: threads and asyncio tasks each get the answers to their own task ids."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from transformers.generation import BaseStreamer

import molora
from molora import RoutingError
from molora.calls.request import Scoped
from tests.zoo import TASKS, batch_for, molora_model

ROUNDS = 20
GATES = ["task-group", "top2-group"]


@pytest.fixture(scope="module", params=GATES)
def model(request):
    return molora_model("llama", request.param, tasks={t: [f"expert_{i}"] for i, t in enumerate(TASKS)})


@pytest.fixture(scope="module")
def prompt():
    return {key: batch_for("llama")[key] for key in ("input_ids", "attention_mask")}


def answer(model, prompt) -> torch.Tensor:
    """Logits of a short greedy generation, every step of which is routed."""
    out = model.generate(
        **prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits)


def expected(model, prompt) -> dict[str, torch.Tensor]:
    found = {}
    for task in TASKS:
        with molora.routing(model, task, by="task"):
            found[task] = answer(model, prompt)
    assert not torch.equal(found["alpha"], found["beta"])
    return found


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run jobs at once; the first error is raised here."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  (raised below, in the thread that can fail the test)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_two_threads_get_their_own_answers(model, prompt):
    right, wrong, together = expected(model, prompt), [], threading.Barrier(2)

    def caller(task: str) -> Callable[[], None]:
        def job() -> None:
            for _ in range(ROUNDS):
                together.wait()
                with molora.routing(model, task, by="task"):
                    wrong.extend([task] * (not torch.equal(answer(model, prompt), right[task])))

        return job

    in_threads(caller("alpha"), caller("beta"))
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate", ["task-group", "task-table", "task-embedding", "top2-group", "sequence-mean"]
)
def test_eight_threads_200_calls_each(gate, prompt):
    """Forwards and generations in turns, each thread with tasks of its own order; 0 wrong of 1,600."""
    maps = {t: [f"expert_{i}"] for i, t in enumerate(TASKS)}
    model = molora_model("llama", gate, tasks=maps)
    right, wrong, together = expected(model, prompt), [], threading.Barrier(8)
    logits = {}
    for task in TASKS:
        with molora.routing(model, task, by="task"):
            logits[task] = model(**prompt).logits

    def caller(first: int) -> Callable[[], None]:
        def job() -> None:
            together.wait()
            for call in range(200):
                task = TASKS[(first + call) % len(TASKS)]
                with molora.routing(model, task, by="task"):
                    if call % 10:
                        wrong.extend([task] * (not torch.equal(model(**prompt).logits, logits[task])))
                    else:
                        wrong.extend([task] * (not torch.equal(answer(model, prompt), right[task])))

        return job

    in_threads(*(caller(i) for i in range(8)))
    assert wrong == []


def test_a_streamer_in_a_thread_of_its_own(model, prompt):
    """As servers stream: `generate` runs in a thread, the main one reads its tokens, and meanwhile asks for another task."""
    right = expected(model, prompt)
    one = {key: value[:1] for key, value in prompt.items()}
    with molora.routing(model, "alpha", by="task"):
        alone = model.generate(**one, max_new_tokens=8, do_sample=False, eos_token_id=None)[
            0, one["input_ids"].shape[1] :
        ]
    streamed: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    def generate() -> None:
        with molora.routing(model, "alpha", by="task"):
            model.generate(**one, max_new_tokens=8, do_sample=False, eos_token_id=None, streamer=Streamer())

    def ask() -> None:
        for _ in range(4):
            with molora.routing(model, "beta", by="task"):
                assert torch.equal(answer(model, prompt), right["beta"])

    in_threads(generate, ask)
    assert streamed[-8:] == alone.tolist()


def test_two_asyncio_tasks_get_their_own_answers(model, prompt):
    right, wrong = expected(model, prompt), []

    async def caller(task: str) -> None:
        for _ in range(ROUNDS):
            with molora.routing(model, task, by="task"):
                await asyncio.sleep(0)  # the other one enters its own context meanwhile
                wrong.extend([task] * (not torch.equal(answer(model, prompt), right[task])))
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(caller("alpha"), caller("beta"))

    asyncio.run(both())
    assert wrong == []


def test_a_thread_sees_neither_ids_nor_records_of_another(prompt):
    model = molora_model("llama", "task-group")

    def without_ids() -> None:
        with pytest.raises(RoutingError, match="no task ids were given"):
            model(**prompt)

    with molora.routing(model, "alpha"), molora.record_routing(model) as record:
        in_threads(without_ids)
        in_threads(lambda: model(**prompt, routing_task_ids="beta"))
        assert record.tokens == 0
        model(**prompt)
    assert set(record.by_task()) == {"alpha"}


def test_contexts_may_overlap(prompt):
    model = molora_model("llama", "task-group")
    logits = {task: model(**prompt, routing_task_ids=task).logits for task in TASKS}
    first, second = molora.routing(model, "alpha"), molora.routing(model, "beta")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(**prompt).logits, logits["beta"])
    second.__exit__(None, None, None)
    with pytest.raises(RoutingError, match="no task ids were given"):
        model(**prompt)


def test_values_are_of_one_owner():
    scoped: Scoped[int] = Scoped("test")
    mine, other = object(), object()
    with scoped.hold(mine, 1), scoped.hold(other, 2), scoped.hold(mine, 3):
        assert scoped.of(mine) == [1, 3] and scoped.of(other) == [2]
    assert scoped.of(mine) == []

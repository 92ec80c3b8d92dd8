"""I8: generation with task ids, beams and the KV cache equals each sample generated on its own."""

from __future__ import annotations

import pytest
import torch

import molora
from tests.zoo import GATES, TASKS, batch_for, molora_model, pairs, routed

MODES = {
    "greedy": {"use_cache": True},
    "no-cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams-return-2": {"num_beams": 3, "num_return_sequences": 2},
    "static-cache": {"cache_implementation": "static"},
}
GENERATIVE = ("llama", "gpt2", "t5")
FAST = ("llama",)  # every gate; each of the others at once by the tests with task ids
# Beams are copied and reordered: what that may break is what a scope keeps of a sample, or reads with it.
BEAMS = [gate for gate in GATES if not gate.startswith(("soft", "top1", "top3", "topp", "topcut"))]


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)


def prompts(architecture):
    batch = batch_for(architecture)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [
        *(("llama", mode) for mode in MODES),
        *((a, mode) for a in GENERATIVE[1:] for mode in ("greedy", "beams-return-2")),
    ],
)
def test_tasks_mixed_in_one_batch_equal_their_merged_models(architecture, mode):
    model, inputs = molora_model(architecture, "task-group"), prompts(architecture)
    together = generate(model, inputs, routing_task_ids=["gamma", "alpha", None], **MODES[mode])
    repeats = len(together) // 3
    for row, task in enumerate(["gamma", "alpha", None]):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        single = molora_model(architecture, "task-group")
        plain = single.unload() if task is None else single.merge_and_unload(task=task)
        assert torch.equal(
            together[row * repeats : (row + 1) * repeats], generate(plain, alone, **MODES[mode])
        )


@pytest.mark.parametrize(("architecture", "gate"), pairs(GATES, architectures=GENERATIVE, fast=FAST))
def test_the_cache_changes_nothing(architecture, gate):
    model, inputs, extra = molora_model(architecture, gate), prompts(architecture), routed(gate)
    cached = generate(model, inputs, use_cache=True, **extra)
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **extra))


@pytest.mark.parametrize(("architecture", "gate"), pairs(BEAMS, architectures=GENERATIVE, fast=FAST))
def test_beams_change_nothing_but_the_search(architecture, gate):
    model, inputs, extra = molora_model(architecture, gate), prompts(architecture), routed(gate)
    cached = generate(model, inputs, use_cache=True, num_beams=3, **extra)
    assert torch.equal(cached, generate(model, inputs, use_cache=False, num_beams=3, **extra))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_cache_of_fixed_size_changes_nothing_for_padded_prompts(architecture):
    model, batch = molora_model(architecture, "sequence-mean"), batch_for(architecture, padding="left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("architecture", GENERATIVE)
def test_the_ways_to_give_task_ids_agree(architecture):
    model, inputs = molora_model(architecture, "task-group"), prompts(architecture)
    expected = generate(model, inputs, routing_task_ids=list(TASKS))
    assert torch.equal(generate(model, inputs, routing_task_ids=torch.tensor([0, 1, 2])), expected)
    assert torch.equal(generate(model, inputs, task_ids=torch.tensor([0, 1, 2])), expected)
    with molora.routing(model, list(TASKS)):
        assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(generate(model.base_model.model, inputs), expected)


def test_statistics_of_generation_exclude_padding():
    model, batch = molora_model("llama", "soft-linear"), batch_for("llama", padding="left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with molora.record_routing(model) as record:
        generate(model, inputs, routing_task_ids=list(TASKS))
    assert record.tokens == int(batch["attention_mask"].sum()) + 3 * 3  # the last token is never fed back
    assert set(record.by_task()) == set(TASKS)


def test_encoder_statistics_know_the_encoder_mask():
    model, batch = molora_model("t5", "soft-linear"), batch_for("t5", padding="right")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with molora.record_routing(model) as record:
        generate(model, inputs)
    gate = next(sums for (gate, _), sums in record.sums.items() if gate.startswith("encoder"))
    assert gate.tokens == int(batch["attention_mask"].sum())

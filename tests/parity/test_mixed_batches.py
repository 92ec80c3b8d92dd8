"""PEFT's mixed LoRA batches (`adapter_names`) are a hard task gate over the same experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from molora import GateConfig
from molora.tuner.config import ExpertSpec
from tests.parity.peers import (
    OPTIONS,
    base,
    copy_loras,
    differs,
    fill,
    lora_tensors,
    molora_layers,
    molora_on_llama,
    peer_layers,
)
from tests.zoo import batch_for

NAMES = ("two", "four", "eight")
RANKS = {"two": 2, "four": 4, "eight": 8}
ALPHAS = {"two": 6, "four": 4, "eight": 12}  # scalings 3, 1 and 1.5
ROWS = {None: "__base__", **{name: name for name in NAMES}}


@pytest.fixture(scope="module")
def peer():
    configs = {name: LoraConfig(r=RANKS[name], lora_alpha=ALPHAS[name], **OPTIONS) for name in NAMES}
    model = get_peft_model(base(), configs["two"], adapter_name="two")
    for name in NAMES[1:]:
        model.add_adapter(name, configs[name])
    fill(lora_tensors(model), seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def model(peer):
    specs = {f"expert_{i}": ExpertSpec(r=RANKS[n], lora_alpha=ALPHAS[n]) for i, n in enumerate(NAMES)}
    made = molora_on_llama(expert_specs=specs, gate=GateConfig(scope="task"), tasks=list(NAMES))
    copy_loras(peer, made, NAMES)
    return made


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_every_batch_of_three_rows(peer, model, padding):
    batch = batch_for("llama", padding=padding)
    count = 0
    with torch.no_grad():
        for tasks in itertools.product(ROWS, repeat=3):
            expected = peer(**batch, adapter_names=[ROWS[task] for task in tasks]).logits
            actual = model(**batch, routing_task_ids=list(tasks)).logits
            for row in range(3):
                assert_close(actual[row], expected[row], atol=1e-10, rtol=1e-10)
            count += 1
    assert count == 4**3


def test_one_input_under_every_task(peer, model):
    row = {key: value[:1].expand(4, -1) for key, value in batch_for("llama").items()}
    expected = peer(**row, adapter_names=list(ROWS.values())).logits
    actual = model(**row, routing_task_ids=list(ROWS)).logits
    assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert torch.equal(actual[0], base()(**row).logits[0])
    assert all(differs(a, b) for a, b in itertools.combinations(actual, 2))


def test_gradients_of_a_mixed_batch(peer, model):
    batch = batch_for("llama", padding="left")
    peer.requires_grad_(False)
    for parameter in lora_tensors(peer):
        parameter.requires_grad_(True)
    peer.zero_grad()
    model.zero_grad()
    expected = peer(**batch, adapter_names=["eight", "__base__", "two"]).loss
    actual = model(**batch, routing_task_ids=["eight", None, "two"]).loss
    assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    expected.backward()
    actual.backward()
    theirs = peer_layers(peer, "lora_A")
    for key, layer in molora_layers(model).items():
        bank = layer.molora_experts["default"]
        for i, name in enumerate(NAMES):
            A, B = bank.stacks["A"].trainable.grad[i], bank.stacks["B"].trainable.grad[i]
            if name == "four":  # nobody asked for it
                assert not A.any() and not B.any()
                continue
            r, lora = RANKS[name], theirs[key]
            assert_close(A[:r], lora.lora_A[name].weight.grad, atol=1e-11, rtol=1e-9)
            assert_close(B[:r].t(), lora.lora_B[name].weight.grad, atol=1e-11, rtol=1e-9)
            assert not A[r:].any() and not B[r:].any()

"""PEFT's Poly, and with splits MHR, is a table of task logits over experts mixed by their factors."""

from __future__ import annotations

import pytest
import torch
from peft import PolyConfig, get_peft_model
from torch.testing import assert_close

from molora import GateConfig
from molora.experts.bank import Expert
from tests.parity.peers import OPTIONS, base, differs, fill, molora_layers, molora_on_llama, peer_layers
from tests.zoo import batch_for

R = 4
IDS = ([2, 0, 1], [1, 1, 1], [0, 2, 0])


def poly_model(splits):
    config = PolyConfig(r=R, n_skills=3, n_tasks=3, n_splits=splits, **OPTIONS)
    model = get_peft_model(base(), config).double()  # its factors are float32 whatever the base is
    fill((p for name, p in model.named_parameters() if "poly_lora" in name), seed=5)
    fill((p for name, p in model.named_parameters() if "module_logits" in name), seed=6, std=1.5)
    return model.eval()


def our_A(theirs):
    """(splits, skills, d_in/splits, r) as (expert, rank, d_in): the splits lie side by side."""
    return torch.stack([torch.cat([part[e].t() for part in theirs], dim=1) for e in range(theirs.shape[1])])


def our_B(theirs):
    """(splits, skills, r, d_out/splits) as (expert, rank, d_out).

    PEFT transposes (splits, r) and then flattens, so its splits lie side by side here too.
    """
    return torch.stack([torch.cat([part[e] for part in theirs], dim=1) for e in range(theirs.shape[1])])


def ours(poly, splits):
    gate = GateConfig(
        scope="task", score="table", transform="sigmoid", select="dense", splits=splits, share="linear"
    )
    model = molora_on_llama(r=R, combine="factors", scaling=1 / R, gate=gate, tasks=["a", "b", "c"])
    theirs = peer_layers(poly, "poly_lora_A")
    for key, layer in molora_layers(model).items():
        peer = theirs[key]
        A, B = our_A(peer.poly_lora_A["default"].detach()), our_B(peer.poly_lora_B["default"].detach())
        experts = [Expert(A[e], B[e].t(), 1 / R) for e in range(3)]
        layer.molora_experts["default"].assign(experts, [False] * 3)
        logits = peer.poly_router["default"].module_logits.detach()
        layer.molora_gate["default"].tasks.assign(logits, [[0, 1, 2]], [False] * 3)
    return model


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("splits", [1, 2])
def test_logits_of_mixed_tasks_are_those_of_poly(splits, padding):
    poly = poly_model(splits)
    model = ours(poly, splits)
    batch = batch_for("llama", padding=padding)
    before = None
    for ids in IDS:
        expected = poly(**batch, task_ids=torch.tensor(ids)).logits
        actual = model(**batch, routing_task_ids=["abc"[i] for i in ids]).logits
        assert_close(actual, expected, atol=1e-10, rtol=1e-10)
        assert before is None or differs(expected, before)  # tasks matter
        before = expected
    assert differs(before, base()(**batch).logits)


@pytest.mark.parametrize("splits", [1, 2])
def test_gradients_of_factors_and_logits_are_those_of_poly(splits):
    poly = poly_model(splits)
    model = ours(poly, splits)
    batch = batch_for("llama")
    expected = poly(**batch, task_ids=torch.tensor([2, 0, 2])).loss  # nobody asks for task 1
    actual = model(**batch, routing_task_ids=["c", "a", "c"]).loss
    assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    expected.backward()
    actual.backward()
    theirs = peer_layers(poly, "poly_lora_A")
    for key, layer in molora_layers(model).items():
        peer, bank = theirs[key], layer.molora_experts["default"]
        (table,) = layer.molora_gate["default"].tasks.blocks
        router = peer.poly_router["default"].module_logits.grad
        assert router[[0, 2]].any(dim=1).all() and not router[1].any()
        assert_close(
            bank.stacks["A"].trainable.grad, our_A(peer.poly_lora_A["default"].grad), atol=1e-11, rtol=1e-9
        )
        assert_close(
            bank.stacks["B"].trainable.grad, our_B(peer.poly_lora_B["default"].grad), atol=1e-11, rtol=1e-9
        )
        assert_close(table.grad, router, atol=1e-11, rtol=1e-9)


def test_two_splits_are_not_one():
    batch, ids = batch_for("llama"), torch.tensor([2, 0, 1])
    split = poly_model(2)
    model = ours(split, 2)
    for layer in molora_layers(model).values():  # both halves get the first half's weights
        (table,) = layer.molora_gate["default"].tasks.blocks
        with torch.no_grad():
            table[:, 3:] = table[:, :3]
    same = model(**batch, routing_task_ids=["c", "a", "b"]).logits
    assert differs(same, split(**batch, task_ids=ids).logits)

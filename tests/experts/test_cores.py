"""Cores of tasks: a diagonal one is a whole matrix that is zero elsewhere, whatever is done with it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import molora
from molora import ConfigError, MoLoraConfig
from molora.experts.cores import DiagonalCores, TaskCores
from molora.tuner.layer import MoLoraLayer
from tests.zoo import TASKS, batch_for, mixture

IDS = {"routing_task_ids": list(TASKS)}


def banks(model):
    return [m.molora_experts["default"] for m in model.modules() if isinstance(m, MoLoraLayer)]


def both():
    """A model with diagonal cores, and one with whole ones of the same numbers; float64."""
    diagonal, whole = (
        mixture("llama", name, dtype=torch.float64) for name in ("cores-diagonal", "cores-table")
    )
    own, other = dict(diagonal.named_parameters()), dict(whole.named_parameters())
    assert own.keys() == other.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            cores = ".cores." in name
            other[name].copy_(torch.diag_embed(parameter).flatten(1) if cores else parameter)
    return diagonal, whole


def test_diagonal_cores_are_matrices_that_are_zero_elsewhere():
    diagonal, whole = both()
    outputs = [model(**batch_for("llama"), **IDS) for model in (diagonal, whole)]
    assert_close(outputs[0].logits, outputs[1].logits, atol=1e-12, rtol=1e-12)
    for out in outputs:
        out.loss.backward()
    for ours, theirs in zip(banks(diagonal), banks(whole), strict=True):
        assert isinstance(ours.cores, DiagonalCores) and ours.cores.weight.shape[1] == ours.ranks[0]
        assert type(theirs.cores) is TaskCores
        (found,), (expected,) = (list(bank.cores.parameters()) for bank in (ours, theirs))
        square = expected.grad.unflatten(1, (ours.ranks[0], -1))
        assert_close(found.grad, square.diagonal(dim1=1, dim2=2), atol=1e-12, rtol=1e-9)
        assert found.grad.any()


def test_a_sample_of_no_task_and_of_several_has_the_identity_and_the_mean():
    cores = DiagonalCores(torch.tensor([[2.0, 3.0], [4.0, 9.0]]), [[0, 1]], [False, False])
    shares = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    h = torch.ones(6, 2)
    expected = torch.tensor([[1.0, 1.0], [3.0, 6.0], [4.0, 9.0]]).repeat_interleave(2, dim=0)
    assert torch.equal(cores(h, shares), expected)
    assert torch.equal(cores.matrices(shares), torch.diag_embed(expected[::2]))


def test_a_new_task_has_the_identity_and_old_ones_stay():
    cores = DiagonalCores.identity(3, [[0]], [False])
    assert torch.equal(cores.weight, torch.ones(1, 3))
    cores.fill(torch.full((1, 3), 5.0))
    cores.grow([[0], [1]], [True, False])
    assert torch.equal(cores.weight, torch.tensor([[5.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize("value", ["diagnal", "full"])
def test_another_shape_is_refused(value):
    with pytest.raises(ConfigError, match=r"task_cores=.* is not one of diagonal"):
        MoLoraConfig(share_A=True, task_cores=value, gate={"kind": "task_table"}, tasks=list(TASKS))


def test_mtl_lora_takes_it():
    assert molora.preset("mtl_lora", task_cores="diagonal").task_cores == "diagonal"

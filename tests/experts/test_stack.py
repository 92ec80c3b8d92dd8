"""A Stack is one tensor in expert order, whatever blocks it is held in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from molora.experts.stack import Stack

ROWS = torch.arange(12.0).reshape(4, 3)


def stack(blocks=((2,), (0, 3), (1,)), frozen=(False, True, False, False)):
    return Stack(ROWS, blocks, frozen)


def test_blocks_hold_the_rows_in_their_own_order_and_only_whole_blocks_freeze():
    made = stack()
    assert [block.tolist() for block in made.blocks] == [
        ROWS[[2]].tolist(),
        ROWS[[0, 3]].tolist(),
        ROWS[[1]].tolist(),
    ]
    assert [block.requires_grad for block in made.blocks] == [True, True, False]
    assert torch.equal(made.weight, ROWS) and list(made.state_dict()) == ["weight"]
    assert torch.equal(made.in_order(torch.tensor([[2, 0, 3, 1]])), torch.tensor([[0, 1, 2, 3]]))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_blocks_and_freezing(assign):
    made = stack()
    made.load_state_dict({"weight": (ROWS + 1).double()}, assign=assign)
    assert torch.equal(made.weight.float(), ROWS + 1)
    assert made.weight.dtype == (torch.float64 if assign else torch.float32)
    assert [block.requires_grad for block in made.blocks] == [True, True, False]
    with pytest.raises(
        RuntimeError, match=r"size mismatch for weight: \(3, 3\) in the file, \(4, 3\) in the model"
    ):
        made.load_state_dict({"weight": ROWS[:3]})
    with pytest.raises(RuntimeError, match="Missing key"):
        made.load_state_dict({})


def test_a_stack_on_meta_is_filled_by_assigning_under_its_name():
    made = stack().to("meta")
    assert made.weight.shape == (4, 3) and made.weight.is_meta
    made.weight = ROWS  # as transformers' loader does
    assert torch.equal(made.weight, ROWS) and not made.blocks[0].is_meta
    assert [block.requires_grad for block in made.blocks] == [True, True, False]


def test_what_is_held_stays_so_until_rows_are_assigned():
    made = stack()
    made.hold()
    made.requires_grad_(True)
    made.apply_freeze()
    assert not any(block.requires_grad for block in made.blocks)
    made.assign(ROWS, [(0, 1, 2, 3)], [False] * 4)
    assert made.blocks[0].requires_grad and [name for name, _ in made.named_parameters()] == ["block_0"]


def test_a_stamp_tells_every_change():
    made = stack()
    stamps = [made.stamp()]
    with torch.no_grad():
        made.blocks[0].add_(1)
    stamps.append(made.stamp())
    made.block_1 = nn.Parameter(made.blocks[1].detach().clone())
    stamps.append(made.stamp())
    made.assign(ROWS, [(0, 1, 2, 3)], [False] * 4)
    stamps += [made.stamp(), made.double().stamp()]
    assert all(a != b for i, a in enumerate(stamps) for b in stamps[:i]) and made.stamp() == made.stamp()


def test_a_copy_is_its_own():
    made = stack()
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.blocks[0].zero_()
    assert torch.equal(made.weight, ROWS) and not torch.equal(twin.weight, ROWS)

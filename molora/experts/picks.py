"""Picks: which few experts each sample, or each token, uses, and how much; what the sparse ways compute from.

    weights (row, expert)   0 .7 0 .3        experts (row, slot)  1 3   weights (row, slot)  .7 .3
                            0 0  1  0   ->                      2 0                          1. 0.

A row with fewer experts than slots has empty slots: some expert, at weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molora.experts.bank import ExpertBank
from molora.experts.output_scale import built


class Picks(NamedTuple):
    """The experts of each row, a sample or a token."""

    experts: Tensor  # (row, slot) int64
    weights: Tensor  # (row, slot), in the gate's dtype

    @classmethod
    def of(cls, weights: Tensor, slots: int) -> Picks:
        """From weights (row, expert) of which at most `slots` in a row are not 0."""
        experts = weights.detach().abs().topk(slots, dim=-1).indices
        return cls(experts, weights.gather(-1, experts))


class Picked(NamedTuple):
    """Rows of a stack that are named but not copied yet."""

    blocks: Sequence[Tensor]  # (expert, rank, d) each; rows are counted through all of them
    places: Tensor  # (row, slot) int64

    @property
    def rank(self) -> int:
        """Of each expert."""
        return self.blocks[0].shape[1]

    def gathered(self, dtype: torch.dtype) -> Tensor:
        """(row, slot * rank, d), a copy as large as what is used."""
        rows, flat = self.places.shape[0], self.places.flatten()
        first, *others = self.blocks
        found = first.index_select(0, flat if not others else flat.clamp(max=len(first) - 1))
        start = len(first)
        for block in others:
            place = (flat - start).clamp(min=0, max=len(block) - 1)
            found = torch.where((flat < start)[:, None, None], found, block.index_select(0, place))
            start += len(block)
        # Not flatten: it cannot name the size of no rows at all.
        return found.to(dtype).reshape(rows, self.places.shape[1] * found.shape[1], found.shape[2])

    def scattered(self, gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """The blocks' gradients, from that of `gathered`; zero in rows that nobody uses."""
        flat, found, start = self.places.flatten(), [], 0
        rows = gradient.reshape(len(flat), *self.blocks[0].shape[1:])
        for block, is_needed in zip(self.blocks, needed, strict=True):
            found.append(_added(rows, flat - start if start else flat, block) if is_needed else None)
            start += len(block)
        return found


def _added(rows: Tensor, place: Tensor, block: Tensor) -> Tensor:
    """A gradient of `block` to which each row is added at its place; those outside of it are left out."""
    # In 16 bits the sum over many samples would be rounded at each of them.
    total = torch.zeros(
        block.shape, dtype=torch.promote_types(block.dtype, torch.float32), device=block.device
    )
    inside = (place >= 0) & (place < len(block))
    place = place.clamp(min=0, max=len(block) - 1)
    rows = torch.where(inside[:, None, None], rows, 0).to(total.dtype)
    if rows.is_cuda:  # index_add_ has no fixed order there, so a run would not repeat itself
        total.index_put_((place,), rows, accumulate=True)
    else:
        total.index_add_(0, place, rows)
    return total.to(block.dtype)


def picked(bank: ExpertBank, experts: Tensor, rank: int | None = None) -> tuple[Picked | None, Picked]:
    """A and B of each row's experts (row, slot), B laid out (expert, rank, d_out); no A where all share one.

    Only what is named is copied, and only when it is multiplied. `rank`: the largest of these experts; what lies beyond is
    padding.
    """
    A, B, _ = picked_scaled(bank, experts, rank)
    return A, B


def picked_scaled(
    bank: ExpertBank, experts: Tensor, rank: int | None = None
) -> tuple[Picked | None, Picked, Tensor | None]:
    """`picked`, and how far the output scales of each row's experts are from 1, (row, slot, d_out), where they have any."""
    stacks, kind, deviation = bank.named_stacks(), bank.kind, None
    if kind.keeps_factors:
        places = stacks["B"].places(experts)  # as in A, where each expert has one of its own
        A, B = (Picked(stacks[name].blocks, places) for name in "AB")
    elif kind.scales_output:
        A, B, deviation = _one_by_one(bank, experts)
    else:
        flat = experts.flatten()
        rows = {n: s.blocks[0] if kind.stacks[n].shared else s.rows[flat] for n, s in stacks.items()}
        places = torch.arange(flat.shape[0], device=flat.device).view_as(experts)
        A, B = (Picked([factor], places) for factor in kind.factors(rows))
    if rank is not None and rank < max(bank.ranks) and not kind.shares_A:
        A, B = (Picked([block[:, :rank] for block in p.blocks], p.places) for p in (A, B))
    return (None if kind.shares_A else A), B, deviation


def _one_by_one(bank: ExpertBank, experts: Tensor) -> tuple[Picked, Picked, Tensor]:
    """Each expert that some row names is built once, by itself: no other one can change its bits."""
    named = (
        range(bank.num_experts) if torch.compiler.is_compiling() else sorted(set(experts.flatten().tolist()))
    )
    stacks = bank.named_stacks()
    found = [
        built(bank.kind, {name: stack.rows[[e]] for name, stack in stacks.items()}, [bank.scalings[e]])
        for e in named
    ]
    place = torch.zeros(bank.num_experts, dtype=torch.long, device=experts.device)
    place[[*named]] = torch.arange(len(found), device=experts.device)
    places = place[experts]
    A, B = (Picked([torch.cat([getattr(part, name) for part in found])], places) for name in "AB")
    deviation = torch.cat([part.deviation for part in found if part.deviation is not None])
    return A, B, deviation[places]


def ordered(bank: ExpertBank) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """A (expert, rank, d_in) and B (expert, rank, d_out) of all experts, in their order; no A where all share one.

    Third: how far their output scales are from 1, (expert, d_out), where they have any.
    """
    stacks, kind = bank.named_stacks(), bank.kind
    rows = {n: s.blocks[0] if kind.stacks[n].shared else s.rows for n, s in stacks.items()}
    A, B, deviation = built(kind, rows, bank.scalings)
    return (None if kind.shares_A else A), B, deviation


def scale_of(bank: ExpertBank, picks: Picks, rank: int) -> Tensor:
    """Weight times scaling of what was picked, (row, slot, rank): 0 beyond an expert's own rank."""
    weights = picks.weights.unsqueeze(-1)
    if len(set(bank.scalings)) == len(set(bank.ranks)) == 1:
        return (weights * bank.scalings[0]).expand(-1, -1, rank)
    columns = torch.arange(rank, device=weights.device)
    scalings, ranks = (
        weights.new_tensor(v)[picks.experts].unsqueeze(-1) for v in (bank.scalings, bank.ranks)
    )
    return weights * scalings * (columns < ranks)

"""The sparse ways: only the experts that samples, or tokens, use. The weights come first, then the products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from molora.calls.call import Part
from molora.calls.task_ids import base_only, check_samples, spread
from molora.calls.task_map import BASE_ONLY
from molora.experts import by_sample, by_token, kernel
from molora.experts.output_scale import mixed
from molora.experts.picks import Picks, ordered, picked, picked_scaled, scale_of
from molora.forward.dense import dense_parts
from molora.forward.dispatch import Way, dispatched, pays_by_token, rows_of
from molora.forward.group_routing import routing_of
from molora.forward.mount import PLAIN, Mount
from molora.forward.reading import Reading
from molora.forward.scaled import Scaled
from molora.forward.sparse_parts import BySample, ByToken, Ready


@dataclass
class Chosen:
    """What each row uses, by slot of the plan. Rows are tokens, or samples: those in `rows`, or all of them."""

    picks: dict[str, Picks]
    weights: dict[str, Tensor]  # (row, expert), of all rows
    rows: Tensor | None = None


def chosen(reading: Reading, way: Way, *, skip: bool = True) -> Chosen:
    """Route a reading: by sample, where the way is that and all tokens of a sample have the same weights; else by token.

    `skip`: leave out samples that ask for the base only, where they are known.
    """
    weights, asked, active = _routed(reading), None, None
    tasks = reading.tasks if reading.tasks is not None and reading.tasks.some_base else None
    counts = [rows_of(leader, reading) for leader in reading.plan.leaders.values()]
    if way.name != "by_sample" or None in counts or (tasks is not None and tasks.ids.dim() == 2):
        rows = math.prod(reading.lead)
        weights = {slot: spread(found, reading.lead) for slot, found in weights.items()}
        if tasks is not None:
            asked = tasks.asked(reading.lead, reading.x.device)
    else:
        if not torch.compiler.is_compiling():  # which would fix the sizes
            for found in weights.values():
                check_samples(found, reading.lead)
        rows = max(found.shape[0] for found in weights.values())
        if tasks is not None:
            samples = tasks.ids.shape[0]
            rows = max(rows, samples)
            asked = base_only(tasks.ids.to(reading.x.device)).repeat_interleave(rows // samples, dim=0)
            active = _active(reading, rows) if skip else None
    weights = {slot: found.expand(rows, -1) for slot, found in weights.items()}
    if asked is not None:
        weights = {slot: found * asked for slot, found in weights.items()}
    picks = {
        slot: _picks(found if active is None else found[active], way, reading.experts, slot)
        for slot, found in weights.items()
    }
    return Chosen(picks, weights, active)


def _routed(reading: Reading) -> dict[str, Tensor]:
    """Weights by slot, rows as they come: tokens, samples, or one for all."""
    by_row = not reading.call.recording and reading.tasks is not None and reading.tasks.ids.dim() == 1
    found: dict[str, Tensor] = {}
    for member, slot in zip(reading.plan.members, reading.plan.slots, strict=True):
        if slot == PLAIN:
            found[slot] = member.task_map.row((1.0,), reading.x)
        elif slot not in found:
            weights = routing_of(member, reading, by_sample=by_row).weights
            rows = rows_of(member.leader, reading)
            if member.leader.gate is None and rows is not None and weights.shape[0] > rows:  # noted by token
                weights = rearrange(weights, "(sample seq) expert -> sample seq expert", sample=rows)[:, 0]
            found[slot] = weights
    return found


def _active(reading: Reading, rows: int) -> Tensor | None:
    """The samples that ask for a task, where they are known by now; None: compute all."""
    known = None if reading.tasks is None else reading.tasks.known
    has_cores = any(member.bank.cores is not None for member in reading.plan.members)
    if known is None or len(known) != rows or has_cores:
        return None
    kept = [i for i, task in enumerate(known) if task != BASE_ONLY]
    return torch.tensor(kept, dtype=torch.long, device=reading.x.device)


def _picks(weights: Tensor, way: Way, experts: tuple[int, ...] | None, slot: str) -> Picks:
    slots = weights.shape[1] if way.slots is None and way.name == "dense" else way.slots
    if slots is None:
        slots = max(1, int((weights != 0).sum(dim=-1).max()))
    picks = Picks.of(weights, min(slots, weights.shape[1]))
    if experts is None or slot == PLAIN:
        return picks
    return picks._replace(experts=torch.tensor(experts, device=weights.device)[picks.experts])


def by_sample_parts(reading: Reading, way: Way) -> dict[str, Part]:
    """By module name, the parts of all members of a plan; a decoding keeps its factors from step to step."""
    follows = _follows(reading)
    plan, kept = reading.plan, reading.plan.kept  # read once: another thread may replace it
    if follows is None:
        plan.kept = None
        return _by_sample(reading, chosen(reading, way))
    facts = (*follows, kernel.linear_dtype(reading.x), reading.x.device)
    if kept is not None and kept.holds(facts):
        return _ready(reading, kept.value)
    return _ready(reading, plan.keep(facts, _keep(reading, chosen(reading, way))))


def _samples(reading: Reading, x: Tensor, samples: int, rows: Tensor | None) -> Tensor:
    """x by sample, (sample, seq, d_in), only of those in `rows`."""
    if rows is None:
        return x.reshape(samples, -1, x.shape[-1])
    assert reading.tasks is not None
    return x.reshape(reading.tasks.ids.shape[0], -1, x.shape[-1]).index_select(0, rows)


def _by_sample(reading: Reading, found: Chosen) -> dict[str, Part]:
    plan, rows = reading.plan, next(iter(found.picks.values())).experts.shape[0]
    x = plan.members[0].bank.dropout(reading.x)
    x = _samples(reading, x, rows, found.rows)
    own, B, deviations = {}, {}, {}
    for member, slot in zip(plan.members, plan.slots, strict=True):
        picks, rank = found.picks[slot], rank_in_use(reading, member)
        A, B[member.key], deviation = picked_scaled(member.bank, picks.experts, rank)
        if deviation is not None:
            deviations[member.key] = _mixed(picks, deviation, found)
        if A is not None:
            own[member.key] = A
    h = {}
    if own:
        columns = by_sample.shrink(x, list(own.values()))
        widths = [A.places.shape[1] * A.rank for A in own.values()]
        h = dict(zip(own, columns.split(widths, dim=-1), strict=True))
    parts: dict[str, Part] = {}
    for member, slot in zip(plan.members, plan.slots, strict=True):
        bank, picks, key = member.bank, found.picks[slot], member.key
        if key not in own:
            one = bank.shared_h(x, picks.experts.shape[1], reading.shares())
            h[key] = one.reshape(x.shape[0], -1, one.shape[-1])
        scale = scale_of(bank, picks, B[key].rank).flatten(1)
        part = BySample(h[key], scale, B[key], found.rows, found.weights[slot])
        parts[key] = Scaled.of(part, bank, deviations[key]) if key in deviations else part
    return parts


def _mixed(picks: Picks, deviation: Tensor, found: Chosen) -> Tensor:
    """Deviation of the output scale of each sample, (sample, d_out); 0 of those that are left out."""
    each = (picks.weights.to(deviation.dtype).unsqueeze(-1) * deviation).sum(dim=1)
    if found.rows is None:
        return each
    samples = len(next(iter(found.weights.values())))
    return each.new_zeros(samples, each.shape[1]).index_copy(0, found.rows, each)


def rank_in_use(reading: Reading, member: Mount) -> int:
    """The largest rank among the experts of the batch's tasks, so that a larger one elsewhere changes no bit."""
    ranks, named = member.bank.ranks, None if reading.tasks is None else reading.tasks.named
    learned = member.plain or member.leader.gate is not None
    if len(set(ranks)) == 1 or learned or named is None or torch.compiler.is_compiling():
        return max(ranks)
    return max((ranks[i] for i in member.task_map.experts_of_all(named)), default=1)


def by_token_parts(reading: Reading, way: Way) -> dict[str, Part]:
    """By module name, the parts of all members of a plan; dense ones where the weights turn out to name too many."""
    found, plan = chosen(reading, way), reading.plan
    if way.slots is None and not dispatched() and not _pays(reading, found):
        return dense_parts(reading, found.weights)
    if reading.x.shape[-2:-1] != (1,):
        plan.kept = None
    x = plan.members[0].bank.dropout(reading.x)
    parts: dict[str, Part] = {}
    for slot in dict.fromkeys(plan.slots):
        members = [m for m, s in zip(plan.members, plan.slots, strict=True) if s == slot]
        picks = found.picks[slot]
        groups = by_token.Groups.of(picks.experts, members[0].bank.num_experts)
        factors = {member.key: ordered(member.bank) for member in members}
        own = {key: A for key, (A, _, _) in factors.items() if A is not None}
        h = {}
        if own:
            columns = by_token.shrink(x, list(own.values()), groups)
            h = dict(zip(own, columns.split([A.shape[1] for A in own.values()], dim=-1), strict=True))
        for member in members:
            bank, key = member.bank, member.key
            if key not in h:
                h[key] = bank.shared_h(x, shares=reading.shares())[groups.token]
            scale = scale_of(bank, picks, factors[key][1].shape[1]).flatten(0, 1)[groups.pair]
            weights, deviation = found.weights[slot], factors[key][2]
            part = ByToken(h[key], scale, factors[key][1], groups, weights)
            parts[key] = (
                part if deviation is None else Scaled.of(part, bank, _of_columns(reading, weights, deviation))
            )
    return parts


def _of_columns(reading: Reading, weights: Tensor, deviation: Tensor) -> Tensor:
    """Deviation of the output scale of each token, (token, d_out), from weights over the experts in use."""
    if reading.experts is not None and weights.shape[1] == len(reading.experts):
        deviation = deviation[[*reading.experts]]
    return mixed(weights, deviation)


def _pays(reading: Reading, found: Chosen) -> bool:
    """Whether the experts that the weights name are few enough, for most of the gates."""
    leaders = reading.plan.leaders.items()
    sizes = {slot: (found.picks[slot].experts.shape[1], found.weights[slot].shape[1]) for slot, _ in leaders}
    return 2 * sum(pays_by_token(leader, *sizes[slot]) for slot, leader in leaders) > len(sizes)


# -- decoding ----------------------------------------------------------------------------------------------


def _follows(reading: Reading) -> tuple[object, ...] | None:
    """What the weights of a decoding step follow from, where the next step may have the same; else None."""
    call, tasks, plan = reading.call, reading.tasks, reading.plan
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or reading.x.shape[-2:-1] != (1,):
        return None
    if call.recording or call.experts is not None or call.without or any(map(_builds, plan.members)):
        return None
    if tasks is not None and (tasks.listed is None or tasks.several is not None):
        return None
    listed, leaders = None if tasks is None else tasks.listed, [*plan.leaders.values()]
    if all(leader.gate is None for leader in leaders):
        return reading.experts, listed
    if call.continued is None or not all(leader.pools for leader in leaders):
        return None
    return reading.experts, listed, call.continued


def _builds(member: Mount) -> bool:
    """Whether its factors are more than A and B of each expert."""
    return member.bank.kind.shares_A or member.bank.kind.scales_output


class Kept(NamedTuple):
    """The factors of each sample's experts, for the steps of a decoding."""

    A: Tensor  # (sample, rank, d_in) of all members
    B: dict[str, Tensor]  # (sample, rank, d_out) by module name, times the weights
    rows: Tensor | None  # as of BySample


def _keep(reading: Reading, found: Chosen) -> Kept:
    dtype, plan = kernel.linear_dtype(reading.x), reading.plan
    A, B = [], {}
    for member, slot in zip(plan.members, plan.slots, strict=True):
        picks = found.picks[slot]
        own, of_member = picked(member.bank, picks.experts, rank_in_use(reading, member))
        assert own is not None  # those that share A are not kept
        scale = scale_of(member.bank, picks, own.rank).flatten(1)
        A.append(own)
        B[member.key] = (of_member.gathered(scale.dtype) * scale.unsqueeze(-1)).to(dtype)
    return Kept(by_sample.joined(A, dtype), B, found.rows)


def _ready(reading: Reading, kept: Kept) -> dict[str, Part]:
    x = _samples(reading, reading.x, len(kept.A), kept.rows).to(kept.A.dtype)
    columns = torch.bmm(x, kept.A.mT).split([B.shape[1] for B in kept.B.values()], dim=-1)
    return {key: Ready(h, B, kept.rows) for (key, B), h in zip(kept.B.items(), columns, strict=True)}

"""Which of three equal ways computes a mixture: the one rule, and how to force one of them.

dense       all experts, one product of the whole bank; the rest are zeros in the weights
by_sample   each sample's own experts, batched by sample
by_token    tokens grouped by expert
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from molora.calls.call import Call
from molora.calls.request import Scoped
from molora.calls.task_ids import TaskIds
from molora.config.gate import UNNORMALISED
from molora.errors import ConfigError
from molora.forward.mount import Mount, MountPoint
from molora.forward.reading import Reading

WAYS = ("dense", "by_sample", "by_token")

# What other work costs, measured on CPUs (eval/bench/mixed.py, scaling.py), in tokens that one expert multiplies:
_COPY = 60  # copying one expert's factors for a sample
_READ = 5  # reading one expert's factors, in the dense product
_SEND = 24  # sending a token to an expert and back; this one in columns of rank, as it does not grow with the rank
_FORCED: Scoped[str] = Scoped("molora_dispatch")
_EVERYWHERE = object()


class Way(NamedTuple):
    """How a reading is computed."""

    name: str
    slots: int | None = None  # experts of a sample or token; None: as many as its weights show
    experts: tuple[int, ...] | None = None  # the only ones to compute


@contextmanager
def dispatch(way: str) -> Iterator[None]:
    """Compute every mixture in one way inside, for tests and measurements; all ways agree up to rounding.

    Args:
        way: "dense", "by_sample" or "by_token".

    Raises:
        ConfigError: no such way.
    """
    if way not in WAYS:
        raise ConfigError(f"dispatch: unknown way {way!r}; there are: {', '.join(WAYS)}.")
    with _FORCED.hold(_EVERYWHERE, way):
        yield


def dispatched() -> str | None:
    """The way that is forced here."""
    forced = _FORCED.of(_EVERYWHERE)
    return forced[-1] if forced else None


def way_of(reading: Reading) -> Way:
    """The way for what is read now; looked up where it was the same the last time."""
    plan, call, forced = reading.plan, reading.call, dispatched()
    if reading.traced or reading.tasks is not None or call.experts is not None or call.features:
        return _way(reading, forced)
    learns, ranks = torch.is_grad_enabled() or reading.mount.bank.training, reading.mount.bank.ranks
    facts, known = (forced, learns, ranks, reading.experts, reading.lead), plan.way
    if known is None or known[0] != facts:
        known = plan.way = facts, _way(reading, forced)
    return known[1]


def _way(reading: Reading, forced: str | None) -> Way:
    leaders, traced = reading.plan.leaders, reading.traced
    if not leaders or (not traced and (reading.x.dim() < 2 or 0 in reading.x.shape)):
        return Way("dense")
    first = next(iter(leaders.values()))
    if not forced and reading.experts is not None and len(reading.experts) == 1:
        return Way("dense")
    rows, slots = rows_of(first, reading), slots_of(first, reading)
    if len(leaders) > 1:
        slots = _most([slots_of(leader, reading) for leader in leaders.values()])
    if forced:
        return Way(forced, slots)
    experts = first.bank.num_experts if reading.experts is None else len(reading.experts)
    tokens = math.prod(reading.lead)
    if first.gate is None and rows is not None and reading.experts is None:
        return Way("by_sample", slots) if traced else _of_tasks(first, reading, rows, tokens, slots)
    if slots is None and rows is None and not traced:
        # Only the weights tell; they are worked out first wherever two experts for each token would pay.
        return Way("by_token" if pays_by_token(first, 2, experts) else "dense")
    if slots is None or slots >= experts:
        return Way("dense", slots)
    if traced:  # a rule that reads sizes would fix them
        return Way("dense" if rows is None else "by_sample", slots)
    return _cheapest(first, slots, experts, rows, tokens)


def _most(slots: list[int | None]) -> int | None:
    known = [count for count in slots if count is not None]
    return max(known) if len(known) == len(slots) else None


def _of_tasks(leader: Mount, reading: Reading, rows: int, tokens: int, slots: int | None) -> Way:
    """For a batch of several tasks, by nothing but these tasks: what they compute does not change with other experts."""
    named = None if reading.tasks is None else reading.tasks.named
    if slots is None or slots == 1 or named is None or leader.feed_forward is not None:
        return Way("by_sample", slots)
    used = leader.task_map.experts_of_all(named)  # a few, which many samples may share
    copied = rows * slots * (_COPY + tokens // rows)
    return Way("by_sample", slots) if copied < len(used) * (_READ + tokens) else Way("dense", slots, used)


def _cheapest(leader: Mount, slots: int, experts: int, rows: int | None, tokens: int) -> Way:
    copies = slots if leader.feed_forward is not None else 1  # it has a copy of its tokens for each slot
    samples = tokens if rows is None else rows  # a few tokens are samples of their own
    costs: dict[str, float] = {
        "dense": experts * (_READ + tokens * copies),
        "by_sample": samples * slots * (_COPY + tokens // samples),
    }
    if rows is None:
        costs["by_token"] = experts * _READ + tokens * slots * (1 + _SEND / max(leader.bank.ranks))
    return Way(min(costs, key=costs.__getitem__), slots)


def pays_by_token(leader: Mount, slots: int, experts: int) -> bool:
    """Whether sending each token to so many of the experts costs less than computing all of them."""
    each = 1 if leader.feed_forward is not None else slots
    rank = max(leader.bank.ranks)
    return each * (_SEND + rank) < experts * rank


def rows_of(leader: Mount, reading: Reading) -> int | None:
    """How many samples have weights of their own, 1 where all have the same; None where each token has."""
    tasks, call, scope = reading.tasks, reading.call, leader.config.gate.scope
    batch = reading.lead[0]
    if call.experts is not None:
        return 1
    if leader.gate is None:
        assert tasks is not None
        if tasks.single is not None:
            return 1
        if tasks.ids.dim() == 2:
            return None
        tasks.repeats(batch)  # refuses ids that do not fit
        return tasks.ids.shape[0]
    if scope == "token" or (tasks is not None and tasks.ids.dim() == 2):
        return None
    if scope in ("external", "two_pass"):
        features = call.features.get("external" if scope == "external" else reading.plan.stream)
        return batch if features is not None and features.dim() == 2 else None
    return batch


def slots_of(leader: Mount, reading: Reading) -> int | None:
    """How many experts a sample or token has at most; None where only the weights tell."""
    tasks, task_map, gate = reading.tasks, leader.task_map, leader.gate
    experts = leader.bank.num_experts if reading.experts is None else len(reading.experts)
    if reading.call.experts is not None:
        return experts
    if gate is None:
        assert tasks is not None
        if tasks.several is not None:
            return min(experts, tasks.most or experts)
        known = tasks.known if tasks.single is None else (tasks.single,)
        return min(experts, task_map.most_experts(known))
    settings = leader.config.gate
    select, transform = settings.select, settings.transform
    # The first learns from experts that are not chosen, the others may choose experts at weight 0, and learn from that.
    # Not by gradients alone: a checkpoint is run without them, and again with them, in the same way.
    learns = torch.is_grad_enabled() or gate.training
    straight = select == "hard" and leader.feed_forward is None and learns
    if select == "dense" or straight or transform in UNNORMALISED:
        return experts
    always = sum(name in task_map.always for name in task_map.experts) if task_map.always else 0
    if select in ("top_k", "hard"):
        return min(experts, (1 if select == "hard" else gate.top_k) + always)
    return None


def ways_in_use(model: nn.Module, samples: int = 16, seq: int = 64) -> dict[str, dict[str, int]]:
    """How many layers compute in which way: in a batch, in a step of decoding; samples are of different tasks.

    Args:
        model: with an active adapter.
        samples: of the batch.
        seq: tokens of each.
    """
    points = [module for module in model.modules() if isinstance(module, MountPoint)]
    mounts = [p.mounts[a] for p in points for a in p.active_adapters if a in p.mounts]
    found: dict[str, dict[str, int]] = {}
    for name, length in ((f"{samples} x {seq} tokens", seq), ("a step of decoding", 1)):
        names = [_usual(mount, samples, length) for mount in mounts if not mount.plain]
        found[name] = {way: names.count(way) for way in WAYS if way in names}
    return found


def _usual(mount: Mount, samples: int, seq: int) -> str:
    ids = [*mount.task_map.ids.values()]
    listed = tuple(ids[i % len(ids)] for i in range(samples)) if ids else ()
    tasks = {
        mount.adapter: TaskIds(
            torch.tensor(listed), listed[0] if len(ids) == 1 else None, False, listed=listed
        )
    }
    features = {"external": torch.empty(samples, 1)} if mount.config.gate.scope == "external" else {}
    call = Call(tasks=tasks if listed else {}, features=features)
    if mount.factors:
        return "by_sample"
    x = torch.empty(1, device="meta").expand(samples, seq, mount.d_in)
    with torch.no_grad():
        return way_of(Reading(mount, call, x, mount.experts(call), alone=True)).name

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

from molora.calls.request import Scoped
from molora.config.gate import UNNORMALISED
from molora.errors import ConfigError
from molora.forward.mount import Mount
from molora.forward.reading import Reading

WAYS = ("dense", "by_sample", "by_token")

# Costs in the time in which one expert multiplies one token, measured on CPUs (eval/bench/mixed.py, scaling.py).
_COPY = 60  # one expert's factors copied for a sample
_READ = 5  # one expert's factors read by the dense product
_SORT = 5.0  # one token sent to one expert and back, instead of multiplied where it lies
_FORCED: Scoped[str] = Scoped("molora_dispatch")
_EVERYWHERE = object()


class Way(NamedTuple):
    """How a reading is computed."""

    name: str
    slots: int | None = None  # experts of a sample or token; None: as many as its weights show


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


def way_of(reading: Reading) -> Way:
    """The way for what is read now."""
    forced = _FORCED.of(_EVERYWHERE)
    leader = next(iter(reading.plan.leaders.values()), None)
    if leader is None or (not forced and reading.experts is not None and len(reading.experts) == 1):
        return Way("dense")
    experts = leader.bank.num_experts if reading.experts is None else len(reading.experts)
    slots = slots_of(leader, reading)
    if forced:
        return Way(forced[-1], slots)
    if slots is None or slots >= experts:
        return Way("dense", slots)
    tokens, rows = math.prod(reading.lead), rows_of(leader, reading)
    if (
        rows is not None and leader.gate is None
    ):  # whatever the experts: a task's outputs do not change when one is added
        return Way("by_sample", slots)
    # A feed-forward has a copy of its tokens for each slot.
    copies, each = (slots, 1) if leader.feed_forward is not None else (1, slots)
    samples = tokens if rows is None else rows  # few tokens are each a sample of its own
    dense = experts * (_READ + tokens * copies)
    if samples * slots * (_COPY + tokens // samples) < dense:
        return Way("by_sample", slots)
    if rows is None and each * (1 + _SORT) < experts and not torch.compiler.is_compiling():
        return Way("by_token", slots)
    return Way("dense", slots)


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
        return len(tasks.ids)
    if scope == "token":
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
            return experts
        listed = tasks.listed if tasks.single is None else (tasks.single,)
        return min(experts, task_map.most_experts(listed))
    settings = leader.config.gate
    select, transform = settings.select, settings.transform
    # The first learns from experts that are not chosen, the others may choose experts at weight 0, and learn from that.
    straight = select == "hard" and leader.feed_forward is None and torch.is_grad_enabled()
    if select == "dense" or straight or transform in UNNORMALISED:
        return experts
    always = sum(1 for name in task_map.experts if name in task_map.always)
    if select in ("top_k", "hard"):
        return min(experts, (1 if select == "hard" else gate.top_k) + always)
    return None

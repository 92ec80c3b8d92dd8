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
    """The way for what is read now."""
    forced = dispatched()
    leader = next(iter(reading.plan.leaders.values()), None)
    if leader is None or (not forced and reading.experts is not None and len(reading.experts) == 1):
        return Way("dense")
    slots, rows = slots_of(leader, reading), rows_of(leader, reading)
    if forced:
        return Way(forced, slots)
    # Whatever the experts: what a task computes does not change when one is added.
    if leader.gate is None and rows is not None and reading.experts is None:
        return Way("by_sample", slots)
    experts = leader.bank.num_experts if reading.experts is None else len(reading.experts)
    if slots is None and rows is None and not torch.compiler.is_compiling():
        # Only the weights tell; they are worked out first wherever two experts for each token would pay.
        return Way("by_token" if pays_by_token(leader, 2, experts) else "dense")
    if slots is None or slots >= experts:
        return Way("dense", slots)
    if torch.compiler.is_compiling():  # a rule that reads sizes would fix them
        return Way("dense" if rows is None else "by_sample", slots)
    return _cheapest(leader, slots, experts, rows, math.prod(reading.lead))


def _cheapest(leader: Mount, slots: int, experts: int, rows: int | None, tokens: int) -> Way:
    copies = slots if leader.feed_forward is not None else 1  # it has a copy of its tokens for each slot
    samples = tokens if rows is None else rows  # a few tokens are samples of their own
    if samples * slots * (_COPY + tokens // samples) < experts * (_READ + tokens * copies):
        return Way("by_sample", slots)
    grouped = rows is None and pays_by_token(leader, slots, experts)
    return Way("by_token" if grouped else "dense", slots)


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
        known = tasks.known if tasks.single is None else (tasks.single,)
        return min(experts, task_map.most_experts(known))
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
    call = Call(tasks=tasks if listed else {})
    if mount.factors:
        return "by_sample"
    x = torch.empty(1, device="meta").expand(samples, seq, mount.d_in)
    with torch.no_grad():
        return way_of(Reading.alone(mount, call, x, mount.experts(call))).name

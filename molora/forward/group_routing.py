"""The routing of a mount within a call: decided once where several layers share it, kept, recorded."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

from torch import Tensor

from molora.calls.call import Call, Stream
from molora.calls.decide import decided, route
from molora.calls.record import GateRecord
from molora.calls.task_ids import base_only
from molora.errors import RoutingError
from molora.forward.mount import Mount
from molora.forward.reading import Reading
from molora.forward.rows import replaces
from molora.gates.gate import Routing
from molora.gates.pooling import pool
from molora.gates.rows import GateRows

_READ_X = ("similarity",)  # losses that look at what the gate read


def sample_routing(reading: Reading) -> Routing:
    """The routing of a mixture of factors: rows are samples (or one for all), those for the base only zero."""
    routing, tasks = routing_of(reading.mount, reading), reading.tasks
    if tasks is not None and tasks.some_base:
        if tasks.ids.dim() != 1:
            raise RoutingError("experts mixed by their factors need one task id per sample, not per token.")
        asked = base_only(tasks.ids.to(reading.x.device)).repeat_interleave(routing.splits, dim=0)
        if len(routing.weights) == routing.splits:  # one mixture for all: now it is not
            routing = replace(routing, weights=routing.weights.repeat(len(tasks.ids), 1))
        routing = replace(routing, weights=routing.weights * asked)
    return routing


def routing_of(
    member: Mount, reading: Reading, products: Tensor | None = None, *, by_sample: bool = False
) -> Routing:
    """The routing of a member of a plan, noted where it owns the gate and somebody looks.

    Args:
        member: of the plan.
        reading: the plan and what it reads.
        products: (tokens, expert) of x and the gate's rows, where they are known already.
        by_sample: give the weights of task ids one row per sample, not per token.
    """
    leader, call, lead = member.group[0], reading.call, reading.lead
    routing = _decide(leader, reading, products, by_sample=by_sample or leader.factors)
    if call.recording and leader is member and _to_be_noted(leader, reading):
        tasks = reading.tasks
        wanted = any(name in leader.config.aux_losses for name in _READ_X)
        call.cache.records[leader.place] = GateRecord(
            routing,
            tuple(lead),
            call.mask(reading.plan.stream, lead),
            call.response(reading.plan.stream, lead),
            None if tasks is None else tasks.expand(lead),
            leader.task_map,
            1 if leader.gate is None else leader.gate.top_k,
            reading.x.detach() if wanted else None,
        )
    return routing


def _to_be_noted(leader: Mount, reading: Reading) -> bool:
    if reading.call.unfit(reading.plan.stream, reading.lead):
        warnings.warn(
            f"{leader.key} reads {reading.lead[1]} positions per sample, which the mask does not tell of: losses and "
            "statistics leave it out.",
            stacklevel=2,
        )
        return False
    seen = reading.call.cache.records.get(leader.place)
    before = None if seen is None else math.prod(seen.lead)
    return replaces(reading.call, reading.plan.stream, math.prod(reading.lead), before)


def _decide(leader: Mount, reading: Reading, products: Tensor | None, *, by_sample: bool) -> Routing:
    """The leader's routing of x, or what it was where this plan's layers only follow.

    That of a gate that reads nothing of the layer is computed once per forward and shape.
    """
    plan, call = reading.plan, reading.call
    cache = call.cache
    if leader.pools and call.continued is not None and call.experts is None:
        kept = call.continued.routings.get(leader.place)
        if kept is None or (kept.experts is None and kept.weights.shape[-1] != leader.bank.num_experts):
            raise _foreign_cache(leader.key)
        return kept
    if leader.reads_input and not leader.spreads:
        return _fresh(leader, reading, products, by_sample=by_sample)
    # One gate may serve encoder and decoder. `numel` would fix an exported size.
    place, tokens = (*leader.place, plan.stream), math.prod(reading.lead)
    follows = leader.spreads and leader.key not in plan.readers
    if follows and not decided(leader.config.gate, leader.task_map, call, reading.experts):
        return _followed(call, place, tokens)
    once = not leader.reads_input and call.owner is not None
    if once and place in cache.routings and cache.routings[place][1] == tokens:
        return cache.routings[place][0]
    routing = _fresh(leader, reading, products, by_sample=by_sample)
    if once:
        cache.routings[place] = routing, tokens
    led = cache.led.get(place)
    if leader.spreads and replaces(call, plan.stream, tokens, None if led is None else led[1]):
        cache.led[place] = routing, tokens
    return routing


def _fresh(leader: Mount, reading: Reading, products: Tensor | None, *, by_sample: bool) -> Routing:
    call, gate = reading.call, leader.gate
    beside = None if gate is None or gate.second is None else _beside(leader, gate.second, reading)
    routing = route(
        reading.x, gate, leader.task_map, reading.tasks, call, reading.experts,
        products=products, stream=reading.plan.stream, by_sample=by_sample, beside=beside,
    )  # fmt: skip
    if leader.pools and call.begun is not None:
        call.begun.routings[leader.place] = replace(routing, weights=routing.weights.detach())
    return routing


def _beside(leader: Mount, second: GateRows, reading: Reading) -> Tensor | None:
    """Logits (batch, expert) of the gate that is blended in: of the sequence, or of the prompt that is continued."""
    call = reading.call
    if call.experts is not None:
        return None
    if call.continued is not None:
        kept = call.continued.logits.get(leader.place)
        if kept is None or kept.shape[-1] != second.num_experts:
            raise _foreign_cache(leader.key)
        return kept
    pooled = call.pooled(reading.plan.stream, reading.lead)
    logits = second.logits(pool(reading.x, pooled, leader.config.gate.pool))
    if call.begun is not None:
        call.begun.logits[leader.place] = logits.detach()
    return logits


def _foreign_cache(key: str) -> RoutingError:
    return RoutingError(
        f"the gate at {key} decides on the prompt, but this cache was not filled by this adapter with its present experts.",
        hint="start the generation with the adapter on, and keep one cache from the prompt on.",
    )


def _followed(call: Call, place: Stream, tokens: int) -> Routing:
    """What a gate decided earlier in this forward, for layers that do not read its input."""
    routing, seen = call.cache.led.get(place, (None, None))
    if routing is None or seen != tokens:
        what = "has not run yet" if routing is None else f"read {seen} tokens, not {tokens}"
        raise RoutingError(
            f"layers share the gate at {place[1]}, which {what} in this forward.",
            hint="use gate.share='group', or call the model as a whole.",
        )
    return routing

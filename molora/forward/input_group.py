"""The linears that read one input compute together, in the way that costs least."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from molora.calls.call import Call, Part, Projection
from molora.experts.factor_mix import add_mixed
from molora.forward.dense import dense_parts
from molora.forward.dispatch import way_of
from molora.forward.feed_forward import mix
from molora.forward.group_routing import sample_routing
from molora.forward.mount import Mount
from molora.forward.reading import Reading
from molora.forward.rows import NOBODYS, of_nobody, rows_of
from molora.forward.samples import note_sample
from molora.forward.sparse import by_sample_parts, by_token_parts


def add_experts(mount: Mount, call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Add one adapter's mixture at one layer to the base layer's output.

    Args:
        mount: the adapter at this layer.
        call: the current one.
        x: (..., d_in) the layer's input.
        y: (..., d_out) the base layer's output; may be overwritten.
    """
    tasks = call.tasks.get(mount.adapter)
    if call.first_pass or (tasks is not None and tasks.all_base):
        return y
    rows = rows_of(mount, call, x)
    if rows is None:
        return _add_by_sample(mount, call, x, x, y)
    if rows is NOBODYS:
        return _add_by_sample(mount, of_nobody(mount, call, x.shape[:-1]), x, x, y)
    return rows.back(_add_by_sample(mount, call, x, rows.by_sample(x), rows.by_sample(y)))


def _add_by_sample(mount: Mount, call: Call, given: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`add_experts` of x (batch, ..., d_in), which is the `given` input, laid by sample."""
    projections, key = call.cache.projections, mount.key
    shared = projections.get(mount.adapter)
    known = shared is not None and key in shared.parts
    if shared is not None and known and shared.x is given:
        part = shared.parts.pop(key)
        if not shared.parts:  # nobody else waits for it
            del projections[mount.adapter]
    else:
        experts = mount.experts(call)
        if experts == () and not mount.plain:  # none of the task's experts is here, or all are left out
            return y
        if mount.feed_forward is not None:
            return mix(Reading(mount, call, x, experts, alone=True), y)
        if mount.factors:
            routing = sample_routing(Reading(mount, call, x, experts, alone=True))
            return add_mixed(mount.bank, x, y, routing.weights, experts, routing.splits)
        # Alone where it was computed already, but of another x: it does not read what the first one of its group reads;
        # and outside a root forward, where nobody says when x or the Parameters changed.
        parts = parts_of(Reading(mount, call, x, experts, alone=known or call.owner is None))
        part = parts.pop(key)
        if parts:
            projections[mount.adapter] = Projection(given, parts)
    if call.recording and part.weights is not None and not mount.plain:
        note_sample(mount, call, x, part.weights)
    return part.add(y)


def parts_of(reading: Reading) -> dict[str, Part]:
    """What each member of a plan adds to its layer's output, by module name."""
    way = way_of(reading)
    if way.name == "by_sample":
        return by_sample_parts(reading, way)
    if way.name == "by_token":
        return by_token_parts(reading, way)
    return dense_parts(reading if way.experts is None else replace(reading, experts=way.experts))

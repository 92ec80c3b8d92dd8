"""Which tokens of which samples the rows of a layer's input are: the one place that says so, or says that it cannot.

Models call their linears with (batch, seq, d), but also with (tokens, d), (seq, batch, d), (batch, 1, seq, d), or with
rows that are no tokens: embeddings of relative positions, the few tokens that an expert of the model's own was sent,
the images of all samples one after the other. What lies otherwise is laid as (batch, seq, d) before anything is decided,
and put back afterwards. Where nobody knows whose rows they are, what depends on the sample is refused, and neither losses
nor statistics count them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molora.calls.call import Call
from molora.calls.shapes import Shape
from molora.errors import RoutingError
from molora.forward.mount import Mount

_TIME_FIRST = {
    "xlnet": re.compile(r"\blayer\.\d+\."),
    "longformer": re.compile(r"\.self\.(query|key|value)(_global)?$"),
    "led": re.compile(r"longformer_self_attn\.(query|key|value)(_global)?$"),
    "fsmt": re.compile(r"\blayers\.\d+\."),
}
"""By model type: layers whose input is (seq, batch, d). It matters where both are equal, which no shape tells apart."""

Lay = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """How to lay an input and an output by sample, and how to put the output back."""

    by_sample: Lay
    back: Lay


def _same(x: Tensor) -> Tensor:
    return x


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


NOBODYS = Rows(_same, _same)
"""Of rows that belong to no sample that is known."""

_SWAPPED = Rows(_swapped, _swapped)


def rows_of(mount: Mount, call: Call, x: Tensor) -> Rows | None:
    """How the rows of a layer's input x (..., d_in) lie; None: by sample already, as they do nearly always."""
    if not call.shapes:  # outside of a whole forward nobody says what the samples are
        return None
    shape, lead = call.shapes.get(mount.stream), x.shape[:-1]
    if shape is None:
        return NOBODYS
    if not lead:
        return None
    batch, known = shape.batch, mount.time_first
    if mount.leaves:  # a mixed feed-forward has a copy of the batch for each slot
        slots = call.cache.slots.get((mount.adapter, mount.feed_forward or ""))
        batch = batch * (1 if slots is None else slots.count)
    if lead[0] == batch and not known:
        return _merged(shape, lead) if len(lead) > 2 else None
    if len(lead) == 2 and lead[1] == batch and (known or _seen_time_first(mount, shape, lead)):
        return _SWAPPED
    if len(lead) == 1 and shape.seq is not None and lead[0] == batch * shape.seq:
        return Rows(lambda t: t.unflatten(0, (batch, -1)), lambda t: t.flatten(0, 1))
    if shape.seq is None or lead.numel() == batch * shape.seq:  # windows and chunks, sample by sample
        return None if lead[0] % max(batch, 1) == 0 else NOBODYS
    return None if lead[0] == batch else NOBODYS


def is_time_first(model_type: str | None, key: str) -> bool:
    """Whether models of this type are known to call the layer named `key` with (seq, batch, d)."""
    found = _TIME_FIRST.get(model_type or "")
    return found is not None and found.search(key) is not None


def _seen_time_first(mount: Mount, shape: Shape, lead: torch.Size) -> bool:
    """Whether a lead of two axes, of which only the second is as long as the batch, is (seq, batch).

    It is remembered for batches that are as long as their sequences, of which no shape tells.
    """
    if lead[0] != shape.seq or lead[0] == 1:
        return False
    if not torch.compiler.is_compiling():
        mount.time_first = True
    return True


def _merged(shape: Shape, lead: torch.Size) -> Rows | None:
    """Of (batch, 1, seq, d): the axes after the first are the sequence's."""
    if shape.seq is None or lead[1:].numel() != shape.seq:
        return None
    return Rows(lambda t: t.flatten(1, -2), lambda t: t.unflatten(1, lead[1:]))


def replaces(call: Call, stream: str, tokens: int, seen: int | None) -> bool:
    """Whether what a layer reads, so many rows, counts more than what it read before in this forward.

    A layer may run again over something else than the sequence: that does not replace its tokens.
    """
    shape = call.shapes.get(stream)
    if seen is None or shape is None or shape.seq is None:
        return True
    whole = shape.batch * shape.seq
    return tokens == whole or seen != whole


def of_nobody(mount: Mount, call: Call, lead: torch.Size) -> Call:
    """The call for rows that belong to no sample: without what is given by sample, and unseen by losses and statistics.

    Raises:
        RoutingError: what is decided there depends on the sample.
    """
    reason = _depends_on_sample(mount, call, lead)
    if reason is not None:
        raise RoutingError(
            f"{mount.key} reads an input of shape {(*lead, mount.d_in)}, whose rows are not the tokens of known samples, "
            f"but {reason}.",
            hint=f"give all samples of a batch the same task, or leave the layer out: exclude_modules=[{mount.key!r}].",
        )
    tasks = call.tasks.get(mount.adapter)
    kept = {mount.adapter: tasks} if tasks is not None and _serves_all(call, tasks) else {}
    return replace(call, tasks=kept, recording=False)


def _serves_all(call: Call, tasks: object) -> bool:
    return tasks.single is not None or tasks.ids.shape == (1,)  # type: ignore[attr-defined]


def _depends_on_sample(mount: Mount, call: Call, lead: torch.Size) -> str | None:
    tasks, gate = call.tasks.get(mount.adapter), mount.config.gate
    several = tasks is not None and not _serves_all(call, tasks)
    if several and tasks is not None:
        by_task = call.by_task or not gate.learned or gate.scope == "task"
        if by_task or tasks.has_base or mount.task_map.isolated or mount.bank.cores is not None:
            return "the samples of this batch ask for different tasks"
    if mount.plain or call.experts is not None or not gate.learned:
        return None
    if gate.scope in ("external", "two_pass"):
        return f"a gate of scope {gate.scope!r} decides by sample or token"
    pools = gate.scope == "sequence" or gate.blend == "sequence"
    if pools and (len(lead) == 1 or call.continued is not None):
        return "the gate decides by sequence"
    return None

"""The routing of a layer within a call: decided once where several layers share it, kept, recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from molora.calls.call import RoutingState, base_only
from molora.calls.decide import decided, experts_in_use, route
from molora.calls.task_map import TaskMap
from molora.errors import RoutingError
from molora.gates.gate import Gate, Routing
from molora.gates.pooling import pool

if TYPE_CHECKING:
    from molora.forward.input_group import Plan
    from molora.tuner.layer import MoLoraLayer

_READ_X = ("similarity",)  # losses that look at what the gate read


@dataclass
class GateRecord:
    """What one gate decided in one forward; kept only while losses or statistics need it."""

    routing: Routing
    lead: tuple[int, ...]  # (batch, seq) of the layer's input
    mask: Tensor | None  # (tokens,) true where a token counts
    response: Tensor | None  # (tokens,) true where a token counts and has a label
    task_ids: Tensor | None  # (tokens,)
    task_map: TaskMap  # the layer's
    top_k: int  # the gate's
    x: Tensor | None = None  # (*lead, d_in) the layer's input without its graph, where a loss needs it

    @property
    def columns(self) -> tuple[int, ...]:
        """The experts that the columns of `routing.decided` stand for."""
        found = self.gated if self.gated is not None else tuple(range(len(self.task_map.experts)))
        used = self.routing.experts
        return found if used is None else tuple(i for i in used if i in found)

    @property
    def gated(self) -> tuple[int, ...] | None:
        """The experts its columns stand for, where some are always on and not among them."""
        return self.task_map.gated if self.routing.gated is not None else None


def task_map_of(layer: MoLoraLayer, adapter: str) -> TaskMap:
    """The tasks and experts of one layer."""
    return layer.context.adapters[adapter].map_at(layer.sites[adapter].names)


def experts_of(layer: MoLoraLayer, adapter: str) -> tuple[int, ...] | None:
    """The experts of a layer that this call is limited to; None: any of them."""
    state, gate = layer.context.state, layer.context.adapters[adapter].config.gate
    tasks = state.tasks.get(adapter)
    return experts_in_use(task_map_of(layer, adapter), tasks, state, scope=gate.scope, learned=gate.learned)


def routing_of(layer: MoLoraLayer, adapter: str, x: Tensor, experts: tuple[int, ...] | None) -> Routing:
    """The routing of one layer by itself, recorded where somebody looks."""
    plan = layer.sites[adapter].inputs.plan(layer, adapter, alone=True)
    return recorded(layer, plan, plan.keys[0], adapter, x, experts, None)


def sample_routing(layer: MoLoraLayer, adapter: str, x: Tensor, experts: tuple[int, ...] | None) -> Routing:
    """The routing of a mixture of factors: rows are samples (or one for all), those for the base only zero."""
    routing = routing_of(layer, adapter, x, experts)
    tasks = layer.context.state.tasks.get(adapter)
    if tasks is not None and tasks.single is None and tasks.has_base:
        if tasks.ids.dim() != 1:
            raise RoutingError("experts mixed by their factors need one task id per sample, not per token.")
        asked = base_only(tasks.ids.to(x.device)).repeat_interleave(routing.splits, dim=0)
        if len(routing.weights) == routing.splits:  # one mixture for all: now it is not
            routing = replace(routing, weights=routing.weights.repeat(len(tasks.ids), 1))
        routing = replace(routing, weights=routing.weights * asked)
    return routing


def recorded(
    layer: MoLoraLayer,
    plan: Plan,
    key: str,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Tensor | None,
) -> Routing:
    """The routing of the site `key`, noted where it owns the gate and somebody looks."""
    context, slot = layer.context, plan.slots[plan.keys.index(key)]
    leader, state = plan.leaders[slot], context.state
    routing = _routing(leader, plan, adapter, x, experts, products)
    if state.recording and slot == key:
        lead, stream, tasks = x.shape[:-1], plan.stream, state.tasks.get(adapter)
        wanted = any(name in context.adapters[adapter].aux_losses for name in _READ_X)
        leader.records[adapter] = GateRecord(
            routing,
            tuple(lead),
            state.mask(stream, lead),
            state.response(stream, lead),
            None if tasks is None else tasks.expand(lead),
            task_map_of(leader, adapter),
            getattr(plan.gates[slot], "top_k", 1),
            x.detach() if wanted else None,
        )
    return routing


def _routing(
    leader: MoLoraLayer,
    plan: Plan,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Tensor | None,
) -> Routing:
    """The leader's routing of x, or what it was where this plan's layers only follow.

    That of a gate that reads nothing of the layer is computed once per forward and shape.
    """
    site, context = leader.sites[adapter], leader.context
    state, slot = context.state, site.key
    if site.pools and state.kept is not None and state.experts is None:
        return _of_prompt(state, adapter, slot)
    if site.reads_input and not site.spreads:
        return _fresh(leader, plan, adapter, x, experts, products)
    # One gate may serve encoder and decoder. `numel` would fix an exported size.
    name, tokens = f"{adapter} {slot} {plan.stream}", math.prod(x.shape[:-1])
    if site.spreads and slot not in plan.readers:
        one = context.adapters[adapter].config.gate.alone_is_one
        if not decided(task_map_of(leader, adapter), state, experts, alone_is_one=one):
            return _followed(state.led, name, slot, tokens)
    once = not site.reads_input and state.owner is not None
    if once and name in state.routings and state.routings[name][1] == tokens:
        return state.routings[name][0]
    routing = _fresh(leader, plan, adapter, x, experts, products)
    if once:
        state.routings[name] = routing, tokens
    if site.spreads:
        state.led[name] = routing, tokens
    return routing


def _fresh(
    leader: MoLoraLayer,
    plan: Plan,
    adapter: str,
    x: Tensor,
    experts: tuple[int, ...] | None,
    products: Tensor | None,
) -> Routing:
    site, state = leader.sites[adapter], leader.context.state
    beside = _beside(leader, adapter, x, plan.gates[site.key], plan.stream)
    routing = route(
        x, plan.gates[site.key], task_map_of(leader, adapter), state.tasks.get(adapter), state, experts,
        products=products, stream=plan.stream, by_sample=site.factors, beside=beside,
    )  # fmt: skip
    if site.pools and state.keep is not None:
        state.keep[f"{adapter} {site.key}"] = replace(routing, weights=routing.weights.detach())
    return routing


def _beside(leader: MoLoraLayer, adapter: str, x: Tensor, gate: Gate | None, stream: str) -> Tensor | None:
    """Logits (batch, expert) of the gate that is blended in: of the sequence, or of the prompt that is continued."""
    if gate is None or gate.second is None or leader.context.state.experts is not None:
        return None
    state, name = leader.context.state, f"{adapter} {leader.sites[adapter].key}"
    if state.kept is not None:
        logits = state.kept.get(name)
        if logits is None:
            raise _foreign_cache(leader.sites[adapter].key)
        return logits
    logits = gate.second.logits(pool(x, state.pooled(stream, x.shape[:-1]), gate.settings.pool))
    if state.keep is not None:
        state.keep[name] = logits.detach()
    return logits


def _foreign_cache(slot: str) -> RoutingError:
    return RoutingError(
        f"the gate at {slot} decides on the prompt, but this cache was not filled by a call of this adapter.",
        hint="start the generation with the adapter on, and keep one cache from the prompt on.",
    )


def _of_prompt(state: RoutingState, adapter: str, slot: str) -> Routing:
    """What a gate of sequence scope decided on the prompt that this call continues."""
    assert state.kept is not None
    routing = state.kept.get(f"{adapter} {slot}")
    if routing is None:
        raise _foreign_cache(slot)
    return routing


def _followed(led: Mapping[str, tuple[Routing, int]], name: str, key: str, tokens: int) -> Routing:
    """What the gate at `key` decided earlier in this forward, for layers that do not read its input."""
    routing, seen = led.get(name, (None, None))
    if routing is None or seen != tokens:
        what = "has not run yet" if routing is None else f"read {seen} tokens, not {tokens}"
        raise RoutingError(
            f"layers share the gate at {key}, which {what} in this forward.",
            hint="use gate.share='group', or call the model as a whole.",
        )
    return routing

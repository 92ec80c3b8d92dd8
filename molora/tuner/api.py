"""Free functions on any model that holds experts: routing, statistics and auxiliary losses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from molora.calls.context import FeatureSource, RoutingContext
from molora.calls.request import RoutingRequest, TaskIdsLike
from molora.calls.statistics import RoutingRecord
from molora.errors import ConfigError, RoutingError
from molora.forward.auxiliary import weighted_sum
from molora.forward.mount import MountPoint
from molora.forward.root_hooks import points_of
from molora.tuner.config import MoLoraConfig


def find_context(model: nn.Module) -> RoutingContext:
    """The routing context of a model, however it was wrapped (PEFT, transformers, compile, DDP)."""
    point = next((m for m in model.modules() if isinstance(m, MountPoint)), None)
    if point is None:
        hint = "build one with peft.get_peft_model(base, MoLoraConfig(...))."
        raise ConfigError(f"{type(model).__name__} has no molora adapter.", hint=hint)
    points_of(point.context, model)
    return point.context


def config_of(context: RoutingContext, adapter: str) -> MoLoraConfig:
    """The config of an adapter, which calls know as a mixture only."""
    config = context.adapters[adapter].config
    assert isinstance(config, MoLoraConfig)
    return config


@contextmanager
def routing(
    model: nn.Module,
    task_ids: TaskIdsLike = None,
    *,
    by: str | None = None,
    experts: Sequence[str] | Mapping[str, float] | None = None,
    features: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    without: Sequence[str] = (),
) -> Iterator[None]:
    """Set task ids, force experts, or give features, for every forward and generate inside.

    Args:
        task_ids: a name or id for all samples, or one per sample (list or integer tensor); None or -1
            inside a list, or -1 alone, means the base model only. A list inside a list: a sample of several tasks,
            in equal shares (task gates).
        by: "task" restricts a learned gate to the tasks' own experts, renormalised over them.
        experts: names (equal weights) or `{name: weight}` to use instead of the gate.
        features: for gates of external scope: (batch, d) one vector per sample, or (batch, seq, d) per token.
        prompt_mask: for gates of sequence scope: (batch, seq), true for the tokens to pool.
        without: experts to leave out, as if they had never been added: a learned gate decides over the others, and of
            a task's weights those of the others remain as they are.

    It holds for the thread or asyncio task that enters it, so that two of them can use one model at once. A thread
    that is started inside it does not inherit it: give its call the ids themselves (`routing_task_ids=`).

    An inner context overrides an outer one field by field; `routing_task_ids=`, `routing_features=` and
    `routing_prompt_mask=` in a call beat both.

    Raises:
        RoutingError: unknown tasks or experts, or a batch that the ids do not fit.
    """
    if by not in (None, "task"):
        raise RoutingError(f"by={by!r} is not None or 'task'.")
    if experts is not None:
        experts = _weights(experts)
    if experts is not None and without:
        raise RoutingError(
            "experts forces some outright, so there is nothing to leave out: give one of the two."
        )
    request = RoutingRequest(
        task_ids=task_ids,
        by=by,
        experts=experts,
        given=task_ids is not None,
        features=features,
        prompt_mask=prompt_mask,
        without=(without,) if isinstance(without, str) else tuple(without),
    )
    with find_context(model).use_request(request):
        yield


def _weights(experts: Sequence[str] | Mapping[str, float]) -> Mapping[str, float]:
    """Expert -> weight; names alone weigh the same."""
    if isinstance(experts, str):
        experts = [experts]
    if not experts:
        raise RoutingError("experts is empty; name one or more, or use task_ids=-1 for the base alone.")
    if not isinstance(experts, Mapping):
        return {name: 1 / len(experts) for name in experts}
    for name, weight in experts.items():
        if not math.isfinite(weight):
            raise RoutingError(f"the weight of expert {name!r} is {weight}; give a number.")
    return experts


def set_feature_source(model: nn.Module, source: FeatureSource | None) -> None:
    """Work out the features of gates of external scope from each call's prompt, unless a call gives them.

    Args:
        model: decoder-only (a generation's features are those of its prompt), or an encoder.
        source: prompts, a list of token ids for each sample, -> features (sample, feature); None takes it away.
            `molora.data.cluster_source.ClusterSource` is one.
    """
    find_context(model).source = source


@contextmanager
def record_routing(model: nn.Module, *, by_row: bool = False) -> Iterator[RoutingRecord]:
    """Count what gates decide in every forward of this thread or asyncio task inside, without padding or activations.

    by_row: `record.take_rows(batch_size)` then says after a batch which experts each of its rows used.
    """
    record = RoutingRecord(by_row=by_row)
    with find_context(model).record(record):
        yield record


@contextmanager
def aux_in_loss(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch off (or on) the adding of auxiliary losses to `out.loss`, for loops that add them themselves."""
    with find_context(model).use_aux_in_loss(enabled):
        yield


def aux_losses(model: nn.Module) -> dict[str, Tensor]:
    """Unweighted auxiliary losses of the last training forward, with their graph.

    Several active adapters: each name's mean over the adapters that have it.

    Raises:
        RoutingError: losses are configured but no training forward ran yet.
    """
    context = find_context(model)
    if not any(context.adapters[a].config.aux_losses for a in context.active):
        return {}
    if context.aux is None:
        text = "no auxiliary losses yet: they come from a forward in train mode with gradients enabled."
        raise RoutingError(text)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for values in context.aux.values():
        for name, value in values.items():
            found[name].append(value)
    return {name: torch.stack(values).mean() for name, values in found.items()}


def aux_loss(model: nn.Module) -> Tensor:
    """Weighted sum of the auxiliary losses of the last training forward; 0 where there are none."""
    context = find_context(model)
    total = torch.zeros((), device=next(model.parameters()).device)
    for adapter, values in (context.aux or {}).items() if aux_losses(model) else ():
        weighted = weighted_sum(context.adapters[adapter].config, values)
        total = total if weighted is None else total + weighted
    return total

"""An adapter's task router in its model: made with the adapter, or given to one that has none."""

from __future__ import annotations

from typing import Any

from torch import nn

from molora.calls.context import AdapterRouting, RoutingContext
from molora.config.router import RouterConfig, router_from
from molora.errors import ConfigError
from molora.forward import root_hooks, task_naming
from molora.forward.task_router import TaskRouter
from molora.tuner.config import MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.loan import own
from molora.tuner.targets import hidden_size


def make_known(model: nn.Module, context: RoutingContext, adapter: str, config: MoLoraConfig) -> None:
    """Tell the context of an adapter, and of the router that its config asks for, which has learned no task yet."""
    context.adapters[adapter] = AdapterRouting(config.task_map(), config)
    if config.router is not None:
        context.adapters[adapter].router = _made(model, config, config.router)


def modules_before_experts(model: nn.Module, config: MoLoraConfig) -> frozenset[str]:
    """Names of the modules that the adapter's router wants without experts.

    Raises:
        ConfigError: that is all blocks.
    """
    if config.router is None or config.router.passes != 1:
        return frozenset()
    block = task_naming.block_at(model, config.router.depth)
    if block is task_naming.block_at(model, 1.0) and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise ConfigError(
            f"router.depth={config.router.depth:.3g} reads the last block, so router.passes=1 leaves none for experts.",
            hint="lower router.depth, or leave router.passes out.",
        )
    return task_naming.modules_until(model, block)


def give_router(model: nn.Module, context: RoutingContext, adapter: str, router: Any) -> None:
    """Give an adapter that is in its model a router: a RouterConfig, a map of its settings, or a kind.

    Raises:
        ConfigError: it has one already, or experts where this one wants none.
    """
    config = own(model, context, adapter)
    if config.router is not None:
        raise ConfigError(
            f"adapter {adapter!r} has a router already: {config.router}.",
            hint="leave router out; what a router has learned belongs to its settings.",
        )
    settings = router_from(router)
    assert settings is not None
    made = _made(model, config, settings)
    config.router, context.adapters[adapter].router = settings, made
    root_hooks.install(model, context)
    if settings.passes == 1 and not context.adapters[adapter].along:
        take_router(model, context, adapter)
        raise ConfigError(
            f"adapter {adapter!r} has experts, or virtual tokens, at or before the block that router.depth="
            f"{settings.depth:.3g} reads, so router.passes cannot be 1.",
            hint="leave router.passes out: the base then reads a prompt first.",
        )
    first = next(m for m in model.modules() if isinstance(m, MoLoraLayer) and adapter in m.mounts)
    first.keep_router(adapter, made)


def take_router(model: nn.Module, context: RoutingContext, adapter: str) -> None:
    """Undo `give_router`."""
    found = context.adapters[adapter]
    own(model, context, adapter).router = None
    found.router, found.read, found.along = None, None, False
    for module in model.modules():
        if isinstance(module, MoLoraLayer):
            module.drop_router(adapter)


def _made(model: nn.Module, config: MoLoraConfig, settings: RouterConfig) -> TaskRouter:
    """A new router over all tasks of the adapter, in the width of the base's hidden states."""
    task_naming.block_at(model, settings.depth)  # refuses a model without blocks before anything changes
    return TaskRouter(settings, [*(config.task_ids or {}).values()], hidden_size(model, "router"))


def where_it_reads(model: nn.Module, context: RoutingContext, adapter: str) -> str | None:
    """For people: after which block an adapter's router reads a prompt, and how often that is read; None without one."""
    found = context.adapters[adapter]
    if found.router is None:
        return None
    blocks = task_naming.blocks_of(model)
    place = next(i for i, block in enumerate(blocks, 1) if block is found.read)
    how = (
        "in the model's own forward" if found.along else "in a pass of its own, since experts sit that early"
    )
    return f"after block {place} of {len(blocks)}, {how}"

"""An adapter's task router in its model: made with the adapter, or given to one that has none."""

from __future__ import annotations

from typing import Any

from torch import nn

from molora.calls.context import AdapterRouting, RoutingContext
from molora.config.router import RouterConfig, router_from
from molora.errors import ConfigError
from molora.forward import task_naming
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
        task_naming.install(model, context, adapter)


def give_router(model: nn.Module, context: RoutingContext, adapter: str, router: Any) -> None:
    """Give an adapter that is in its model a router: a RouterConfig, a map of its settings, or a kind.

    Raises:
        ConfigError: it has one already.
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
    task_naming.install(model, context, adapter)
    first = next(m for m in model.modules() if isinstance(m, MoLoraLayer) and adapter in m.mounts)
    first.keep_router(adapter, made)


def _made(model: nn.Module, config: MoLoraConfig, settings: RouterConfig) -> TaskRouter:
    """A new router over all tasks of the adapter, in the width of the base's hidden states."""
    task_naming.block_at(model, settings.depth)  # refuses a model without blocks before anything changes
    return TaskRouter(settings, [*(config.task_ids or {}).values()], hidden_size(model, "router"))

"""An adapter's task router in its model: made with the adapter, or given to one that has none."""

from __future__ import annotations

from typing import Any

from torch import nn

from molora.calls.context import RoutingContext
from molora.config.router import router_from
from molora.errors import ConfigError
from molora.forward import task_naming
from molora.forward.task_router import TaskRouter
from molora.tuner.config import MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.targets import hidden_size


def make_router(model: nn.Module, context: RoutingContext, adapter: str) -> None:
    """The router that an adapter's config asks for, if any, over all tasks of the adapter; it has learned none yet."""
    found = context.adapters[adapter]
    config: MoLoraConfig = found.config
    if config.router is not None:
        found.router = TaskRouter(
            config.router, [*(config.task_ids or {}).values()], hidden_size(model, "router")
        )
        task_naming.install(model, context, adapter)


def give_router(model: nn.Module, context: RoutingContext, adapter: str, router: Any) -> None:
    """Give an adapter that is in its model a router: a RouterConfig, a map of its settings, or a kind.

    Raises:
        ConfigError: it has one already.
    """
    config: MoLoraConfig = context.adapters[adapter].config
    if config.router is not None:
        raise ConfigError(
            f"adapter {adapter!r} has a router already: {config.router}.",
            hint="leave router out; what a router has learned belongs to its settings.",
        )
    config.router = router_from(router)
    make_router(model, context, adapter)
    first = next(m for m in model.modules() if isinstance(m, MoLoraLayer) and adapter in m.mounts)
    first.keep_router(adapter, context.adapters[adapter].router)

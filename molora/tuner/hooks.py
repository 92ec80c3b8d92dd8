"""RootHooks: the one place every forward crosses, whoever calls the model.

PEFT's own forwards, direct calls of the base model, every decoding step of generate and transformers'
adapter integration all run the wrapped base model's `__call__`; the tuner's `forward` they may bypass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from molora.context import CheckpointWithRouting, RoutingContext, RoutingRequest, RoutingState
from molora.tuner.aux import aux_losses_of, weighted_sum
from molora.tuner.config import MoLoraConfig
from molora.tuner.layer import MoLoraLayer

_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class RootHooks:
    """Opens a RoutingState before the forward; gathers losses and statistics after it."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook: task ids and masks in."""
        kwargs = dict(kwargs)
        given = kwargs.pop("routing_task_ids", None)
        context = self.context
        if context.state.owner is not None:  # the encoder inside a running root forward
            return args, kwargs
        layers = layers_of(context, module)
        outer = context.state
        if given is not None:
            state = context.resolve(RoutingRequest(task_ids=given, given=True).over(context.request))
        elif context.request.given and set(outer.tasks) != set(
            context.active
        ):  # adapters were switched meanwhile
            state = context.resolve(context.request)
        else:
            state = outer.fork(recompute=False)
        state.owner, state.outer, state.masks, state.led = module, outer, _masks(module, args, kwargs), {}
        learns = module.training and torch.is_grad_enabled()
        if learns:  # a batch for the base only still gives every expert a gradient (zero): DDP waits for it
            state.tasks = {name: ids.without_shortcut() for name, ids in state.tasks.items()}
        state.recording = bool(context.recorders) or (
            learns and any(context.adapters[a].aux_losses for a in context.active)
        )
        context.state = state
        if module.training and layers:
            self._wrap_checkpoints(module)
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook, called even after an exception: records out, state closed."""
        context = self.context
        state = context.state
        if state.owner is not module:
            return None
        context.state = state.outer or RoutingState()
        if not state.recording:
            return None
        layers = layers_of(context, module)
        records = {adapter: _collect(layers, adapter) for adapter in context.active}
        if output is None:
            return None
        for recorder in context.recorders:
            for adapter, named in records.items():
                recorder.add(context.adapters[adapter].task_map, named)
        if module.training and torch.is_grad_enabled():
            return self._auxiliary(kwargs, output, [layer for _, layer in layers], records)
        return None

    def _auxiliary(self, kwargs: dict[str, Any], output: Any, layers: Any, records: Any) -> Any:
        context = self.context
        context.aux = {}
        for adapter in context.active:
            config: MoLoraConfig = context.adapters[adapter].config
            context.aux[adapter] = aux_losses_of(config, adapter, layers, [r for _, r in records[adapter]])
            total = weighted_sum(config, context.aux[adapter])
            if (
                total is not None
                and config.add_aux_to_loss
                and context.aux_in_loss
                and kwargs.get("labels") is not None
            ):
                output = _add_to_loss(output, total)
        return output

    def _wrap_checkpoints(self, root: nn.Module) -> None:
        context = self.context
        for module in _checkpointing_modules(context, root):
            if not getattr(module, "gradient_checkpointing", True):
                continue
            for name in _CHECKPOINT_ATTRIBUTES:
                function = module.__dict__.get(name)
                if function is None:
                    continue
                if not isinstance(function, CheckpointWithRouting):
                    function = CheckpointWithRouting(function, context)
                    module.__dict__[name] = function
                function.refuse_lost_gradients()


def install(model: nn.Module, context: RoutingContext) -> None:
    """Register the hooks on a base model, and on its encoder, which generate() calls on its own."""
    hooks = RootHooks(context)
    roots = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        roots.append(model.get_encoder())  # type: ignore[operator]
    for root in roots:
        if not any(
            isinstance(getattr(h, "__self__", None), RootHooks) for h in root._forward_pre_hooks.values()
        ):
            root.register_forward_pre_hook(hooks.enter, with_kwargs=True)
            root.register_forward_hook(hooks.leave, with_kwargs=True, always_call=True)
    layers_of(context, model)  # now: a cache that the first forward fills would compile the model twice


def uninstall(model: nn.Module) -> None:
    """Remove every trace of the hooks; nothing of molora stays on an unloaded model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), RootHooks)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        for name in _CHECKPOINT_ATTRIBUTES:
            if isinstance(function := module.__dict__.get(name), CheckpointWithRouting):
                module.__dict__[name] = function.checkpoint


def layers_of(context: RoutingContext, root: nn.Module) -> list[tuple[str, MoLoraLayer]]:
    """Name and layer of everything adapted, and the active adapters as the layers have them."""
    if context.layers is None:
        context.layers = [(name, m) for name, m in root.named_modules() if isinstance(m, MoLoraLayer)]
    if context.layers:
        context.active = [a for a in context.layers[0][1].active_adapters if a in context.adapters]
    return context.layers


def _checkpointing_modules(context: RoutingContext, root: nn.Module) -> list[nn.Module]:
    """Modules that may hold a checkpoint function; wrappers may have come after the installation."""
    if context.checkpointed is not None:
        return context.checkpointed
    found = [m for m in root.modules() if hasattr(m, "gradient_checkpointing") or hasattr(m, "checkpoint_fn")]
    if not torch.compiler.is_compiling():
        context.checkpointed = found
    return found


def _masks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    if args:
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
    mask = kwargs.get("attention_mask")
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return {"decoder": mask} if isinstance(mask, Tensor) else {}
    decoder = kwargs.get("decoder_attention_mask")
    if decoder is None and isinstance(kwargs.get("labels"), Tensor):
        decoder = kwargs["labels"] != -100
    found = {"encoder": mask, "decoder": decoder}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _collect(layers: list[tuple[str, MoLoraLayer]], adapter: str) -> list[tuple[str, Any]]:
    return [
        (layer.sites[adapter].key, layer.records.pop(adapter))
        for _, layer in layers
        if adapter in layer.records
    ]


def _add_to_loss(output: Any, extra: Tensor) -> Any:
    if isinstance(output, tuple):
        return (output[0] + extra, *output[1:])
    if output.loss is not None:
        output.loss = output.loss + extra.to(output.loss.dtype)
    return output

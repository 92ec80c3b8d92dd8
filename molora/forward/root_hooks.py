"""RootHooks: the one place every forward crosses, whoever calls the model.

PEFT's own forwards, direct calls of the base model, every decoding step of generate and transformers'
adapter integration all run the wrapped base model's `__call__`; the tuner's `forward` they may bypass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from molora.calls.call import CheckpointWithRouting, RoutingContext, RoutingRequest, RoutingState
from molora.calls.prompt import attach, named_inputs, read_inputs
from molora.forward.auxiliary import aux_losses_of, balance_experts, weighted_sum
from molora.forward.first_pass import first_pass, off, remember
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
        request = _own_request(kwargs)
        context = self.context
        if context.state.owner is not None:  # the encoder inside a running root forward, or its first pass
            return args, kwargs
        layers = layers_of(context, module)
        outer = context.state
        if request is not None:
            request = request.over(context.request)
            state = context.resolve(request)
        else:
            request = context.request
            # Adapters may have been switched since the request was resolved.
            switched = request.given and set(outer.tasks) != set(context.active)
            state = context.resolve(request) if switched else outer.fork(recompute=False)
        state.owner, state.outer, state.led = module, outer, {}
        inputs = named_inputs(module, args, kwargs)
        read_inputs(context, state, request, module, inputs)
        learns = module.training and torch.is_grad_enabled()
        if learns:  # a batch for the base only still gives every expert a gradient (zero): DDP waits for it
            state.tasks = {name: ids.without_shortcut() for name, ids in state.tasks.items()}
        configs = [context.adapters[a].config for a in context.active]
        state.recording = bool(context.recorders) or (
            learns and any(c.aux_losses or c.gate.balance_rate for c in configs)
        )
        if learns and any(config.gate.balance_rate for config in configs):
            state.balances = _balances(layers)
        context.state = state
        if any(config.gate.scope == "two_pass" for config in configs) and not off(layers):
            args, kwargs = first_pass(context, state, module, args, kwargs)
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
        if output is not None:
            attach(state, kwargs, output)
            if state.base_cache is not None or "encoder" in state.features:
                remember(context, state, kwargs, output)
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
            found = [record for _, record in records[adapter]]
            context.aux[adapter] = aux_losses_of(config, adapter, layers, found)
            if config.gate.balance_rate:
                balance_experts(config, adapter, layers, records[adapter])
            total = weighted_sum(config, context.aux[adapter])
            if total is not None and config.add_aux_to_loss and context.aux_in_loss:
                output = _add_to_loss(output, total, labelled=kwargs.get("labels") is not None)
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


def _balances(layers: list[tuple[str, MoLoraLayer]]) -> dict[int, Tensor]:
    """The balance of every gate now: it moves after the forward, and checkpoints are computed again after that."""
    gates = [gate for _, layer in layers for gate in layer.molora_gate.values()]
    return {id(gate): gate.balance.clone() for gate in gates if gate.balance is not None}


def _own_request(kwargs: dict[str, Any]) -> RoutingRequest | None:
    """What a call asks for by keywords of its own, taken out of them."""
    ids, features = kwargs.pop("routing_task_ids", None), kwargs.pop("routing_features", None)
    prompt = kwargs.pop("routing_prompt_mask", None)
    if ids is None and features is None and prompt is None:
        return None
    return RoutingRequest(task_ids=ids, given=ids is not None, features=features, prompt_mask=prompt)


def _collect(layers: list[tuple[str, MoLoraLayer]], adapter: str) -> list[tuple[str, Any]]:
    return [
        (layer.sites[adapter].key, layer.records.pop(adapter))
        for _, layer in layers
        if adapter in layer.records
    ]


def _add_to_loss(output: Any, extra: Tensor, *, labelled: bool) -> Any:
    """The output with a larger loss, where it has one. A plain tuple begins with it if there were labels."""
    if isinstance(output, tuple):
        return (output[0] + extra, *output[1:]) if labelled else output
    if getattr(output, "loss", None) is not None:
        output.loss = output.loss + extra.to(output.loss.dtype)
    return output

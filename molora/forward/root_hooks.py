"""RootHooks: the one place every forward crosses, whoever calls the model.

PEFT's own forwards, direct calls of the base model, every decoding step of generate and transformers'
adapter integration all run the wrapped base model's `__call__`; the tuner's `forward` they may bypass.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.calls.call import Call, CallCache
from molora.calls.checkpoint import CheckpointWithRouting
from molora.calls.context import AdapterRouting, RoutingContext, new_call
from molora.calls.prompt import attach, named_inputs, with_inputs
from molora.calls.record import GateRecord
from molora.calls.request import RoutingRequest
from molora.forward import prompt_hooks, task_naming
from molora.forward.auxiliary import aux_losses_of, balance_experts, weighted_sum
from molora.forward.first_pass import first_pass, off, remember
from molora.forward.mount import Mount, MountPoint
from molora.forward.prompts import PROMPTS

_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class RootHooks:
    """Opens a Call before the forward; gathers losses and statistics after it."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook: task ids and masks in."""
        kwargs = dict(kwargs)
        own = _own_request(kwargs)
        context = self.context
        if context.here.call is not None:  # the encoder inside a running root forward, or its first pass
            return args, kwargs
        points = points_of(context, module)
        request, tasks = context.asked(own)
        learns = module.training and torch.is_grad_enabled()
        if learns:  # a batch for the base only still gives every expert a gradient (zero): DDP waits for it
            tasks = {name: ids.without_shortcut() for name, ids in tasks.items()}
        configs = [context.adapters[a].config for a in context.active]
        balanced = learns and any(config.gate.balance_rate for config in configs)
        call = replace(
            new_call(request, tasks),
            owner=module,
            recording=bool(context.recorders) or balanced or (learns and any(c.aux_losses for c in configs)),
            balances=_balances(points) if balanced else {},
        )
        call = replace(call, unnamed=_unnamed(context, call, module, points))
        inputs = named_inputs(module, args, kwargs)
        call = with_inputs(context, call, request, module, inputs)
        if call.unnamed and call.begun is not None:
            call = task_naming.name_tasks(context, call, module, inputs)
        if any(config.gate.scope == "two_pass" for config in configs) and not off(points):
            call, args, kwargs = first_pass(context, call, module, args, kwargs)
        context.here.call = call
        if module.training and points:
            self._wrap_checkpoints(module)
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook, called even after an exception: records out, call closed."""
        context = self.context
        call = context.here.call
        if call is None or call.owner is not module:
            return None
        context.here.call = None
        if output is None:
            return None
        attach(call, kwargs, output)
        remember(context, call, kwargs, output)
        if not call.recording:
            return None
        mounts = {adapter: mounts_of(context, module, adapter) for adapter in context.active}
        records = {adapter: _collect(call.cache, adapter, mounts[adapter]) for adapter in mounts}
        for recorder in context.recorders:
            for adapter, named in records.items():
                recorder.add(context.adapters[adapter].task_map, named)
        if module.training and torch.is_grad_enabled():
            return self._auxiliary(call, kwargs, output, mounts, records)
        return None

    def _auxiliary(
        self,
        call: Call,
        kwargs: dict[str, Any],
        output: Any,
        mounts: dict[str, list[Mount]],
        records: dict[str, list[tuple[str, GateRecord]]],
    ) -> Any:
        context = self.context
        context.aux = {}
        for adapter in context.active:
            config = context.adapters[adapter].config
            found = [record for _, record in records[adapter]]
            context.aux[adapter] = aux_losses_of(config, mounts[adapter], found, call.cache.samples)
            if config.gate.balance_rate:
                balance_experts(mounts[adapter], records[adapter])
            total = weighted_sum(config, context.aux[adapter])
            if total is not None and config.add_aux_to_loss and context.aux_in_loss:
                _say_unread(kwargs)
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


_OURS = (RootHooks, task_naming.AfterBlock, prompt_hooks.PromptHooks)


def install(model: nn.Module, context: RoutingContext) -> None:
    """Register the hooks on a base model, on its encoder, which generate() calls on its own, and on what routers read."""
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
    points_of(context, model)  # now: a cache that the first forward fills would compile the model twice
    for adapter, found in context.adapters.items():
        if found.router is not None:
            task_naming.install(
                model, context, adapter, [mount.key for mount in mounts_of(context, model, adapter)]
            )
        if found.prompts is not None:
            prompt_hooks.install(model, context, adapter, mounts_of(context, model, adapter))


def uninstall(model: nn.Module) -> None:
    """Remove every trace of the hooks; nothing of molora stays on an unloaded model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), _OURS)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        for name in _CHECKPOINT_ATTRIBUTES:
            if isinstance(function := module.__dict__.get(name), CheckpointWithRouting):
                module.__dict__[name] = function.checkpoint


def points_of(context: RoutingContext, root: nn.Module) -> list[MountPoint]:
    """Everything adapted, in the model's order; notes the active adapters as the layers have them."""
    if context.points is None:
        context.points = [m for m in root.modules() if isinstance(m, MountPoint)]
    points: list[MountPoint] = context.points
    if points:
        context.active = [a for a in points[0].active_adapters if a in context.adapters]
    return points


def mounts_of(context: RoutingContext, root: nn.Module, adapter: str) -> list[Mount]:
    """One adapter's mounts, in the model's order."""
    return [point.mounts[adapter] for point in points_of(context, root) if adapter in point.mounts]


def _checkpointing_modules(context: RoutingContext, root: nn.Module) -> list[nn.Module]:
    """Modules that may hold a checkpoint function; wrappers may have come after the installation."""
    if context.checkpointed is not None:
        return context.checkpointed
    found = [m for m in root.modules() if hasattr(m, "gradient_checkpointing") or hasattr(m, "checkpoint_fn")]
    if not torch.compiler.is_compiling():
        context.checkpointed = found
    return found


def _balances(points: list[MountPoint]) -> dict[int, Tensor]:
    """The balance of every gate now: it moves after the forward, and checkpoints are computed again after that."""
    gates = [mount.gate for point in points for mount in point.mounts.values() if mount.gate is not None]
    return {id(gate): gate.balance.clone() for gate in gates if gate.balance is not None}


def _unnamed(
    context: RoutingContext, call: Call, module: nn.Module, points: list[MountPoint]
) -> tuple[str, ...]:
    """Adapters that need task ids, were given none, and have a router to name them. Training names nothing."""
    if module.training or call.experts is not None or off(points):
        return ()
    return tuple(
        name
        for name in context.active
        if name not in call.tasks and _needs_names(context.adapters[name], by_task=call.by_task)
    )


def _needs_names(found: AdapterRouting, *, by_task: bool) -> bool:
    """Whether an adapter's router has to name the tasks of a prompt: its answer depends on them.

    Under a learned gate it does where experts are isolated from some tasks, once the router has learned some to tell apart.
    """
    if found.router is None:
        return False
    if by_task or found.config.gate.scope == "task":
        return True
    return bool(found.task_map.isolated) and len(found.router.learned) > 1


def _own_request(kwargs: dict[str, Any]) -> RoutingRequest | None:
    """What a call asks for by keywords of its own, taken out of them."""
    ids, features = kwargs.pop("routing_task_ids", None), kwargs.pop("routing_features", None)
    prompt = kwargs.pop("routing_prompt_mask", None)
    if ids is None and features is None and prompt is None:
        return None
    return RoutingRequest(task_ids=ids, given=ids is not None, features=features, prompt_mask=prompt)


def _collect(cache: CallCache, adapter: str, mounts: list[Mount]) -> list[tuple[str, GateRecord]]:
    """Records by module name, in the model's order whatever the order of the calls; that of the prompts comes first."""
    keys = [PROMPTS, *(mount.key for mount in mounts)]
    return [(key, cache.records[adapter, key]) for key in keys if (adapter, key) in cache.records]


def _say_unread(kwargs: dict[str, Any]) -> None:
    """Warn where the caller does not read `out.loss`: TRL's trainers ask for log-probabilities, and add those up."""
    if kwargs.get("fused_lm_head"):
        warnings.warn(
            "this trainer does not read out.loss, so the auxiliary losses are lost. Put molora.hf.MoLoraTrainerMixin "
            "before its class: class MySFTTrainer(MoLoraTrainerMixin, SFTTrainer).",
            stacklevel=2,
        )


def _add_to_loss(output: Any, extra: Tensor, *, labelled: bool) -> Any:
    """The output with a larger loss, where it has one. A plain tuple begins with it if there were labels."""
    if isinstance(output, tuple):
        return (output[0] + extra, *output[1:]) if labelled else output
    if getattr(output, "loss", None) is not None:
        output.loss = output.loss + extra.to(output.loss.dtype)
    return output

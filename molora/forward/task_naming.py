"""A prompt that comes without a task id: the base alone reads it up to an early block, and the adapter's router names it.

Once per prompt. The names become the call's task ids, as if the caller had given them, and stay with the key-value cache
(of an encoder-decoder: with the encoder's output). Ids that a caller gives are never replaced, and training names nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from molora.calls.call import Call, CallCache
from molora.calls.context import RoutingContext
from molora.calls.prompt import attended, is_causal, remembered
from molora.calls.task_ids import resolve_ids
from molora.calls.task_map import BASE_ONLY
from molora.errors import ConfigError, RoutingError
from molora.forward.task_router import TaskRouter

_READ = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
_GIVE_IDS = "give routing_task_ids=[...], one per sample"


class StopAfter:
    """Ends the base's first pass after the block that the router reads; a hook of that block."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        call = self.context.here.call
        if call is not None and call.stops_after is block:
            raise _Reached(output[0] if isinstance(output, tuple) else output)


class _Reached(Exception):
    """No error: the way out of a forward that has done its work."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def install(model: nn.Module, context: RoutingContext, adapter: str) -> None:
    """Find the block that the adapter's router reads, and let it end first passes."""
    found = context.adapters[adapter]
    found.read = block_at(model, found.config.router.depth)
    hooks = found.read._forward_hooks.values()
    if not any(isinstance(getattr(hook, "__self__", None), StopAfter) for hook in hooks):
        found.read.register_forward_hook(StopAfter(context).leave)


def block_at(model: nn.Module, depth: float) -> nn.Module:
    """The block of the base (an encoder-decoder's encoder) after which this share of its blocks has run; at least one.

    Raises:
        ConfigError: the model does not say which its blocks are.
    """
    reader, config = _reader(model), getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    count = getattr(config, "num_hidden_layers", None)
    lists = (m for m in reader.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    blocks = next(lists, None)
    if blocks is None:
        raise ConfigError(
            f"router: {type(model).__name__} has no list of blocks as long as its config's num_hidden_layers.",
            hint="a task router needs a transformers model; leave router out and give task ids.",
        )
    return blocks[max(1, round(depth * len(blocks))) - 1]


@torch.compiler.disable(reason="one graph cannot name tasks: give routing_task_ids=[...], one per sample")
def name_tasks(context: RoutingContext, call: Call, module: nn.Module, inputs: Mapping[str, Any]) -> Call:
    """The call with the task ids of its samples, for the adapters that need them and were given none."""
    assert call.begun is not None
    encoded = remembered(inputs.get("encoder_outputs"))
    if encoded is not None:
        call.begun.tasks.update(encoded.tasks)
    for adapter in call.unnamed if encoded is None else ():
        states, mask = read_base(context, call, adapter, module, inputs)
        call.begun.tasks[adapter] = _ids(context, adapter, mean_of(states, mask))
    return replace(call, tasks={**call.begun.tasks, **call.tasks})


def read_base(
    context: RoutingContext, call: Call, adapter: str, module: nn.Module, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Hidden states (batch, seq, d) of the base's early block for a call's inputs, and a mask (batch, seq) of its prompt."""
    reader = _reader(module)
    parameters = inspect.signature(reader.forward).parameters
    given = {name: inputs[name] for name in _READ if inputs.get(name) is not None and name in parameters}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None:
        raise RoutingError(
            "this call has no prompt to name a task by: neither input_ids nor inputs_embeds, and encoder_outputs "
            "that were made without the adapter.",
            hint=f"{_GIVE_IDS}.",
        )
    mask = attended(inputs)
    mask = torch.ones(tokens.shape[:2], device=tokens.device).long() if mask is None else mask.long()
    if is_causal(module) and reader is not module and "position_ids" in parameters:
        # As generate() counts, so that padding in front changes nothing.
        given.setdefault("position_ids", (mask.cumsum(dim=1) - 1).clamp(min=0))
    given["attention_mask"] = mask
    if "use_cache" in parameters:
        given["use_cache"] = False
    block = context.adapters[adapter].read
    alone = replace(call, first_pass=True, stops_after=block, owner=module, cache=CallCache())
    run = (
        reader.forward if reader is module else reader
    )  # the module's own hooks would open a call of their own
    try:
        with torch.no_grad(), context.use_call(alone):
            run(**given)
    except _Reached as reached:
        states = reached.states
    else:
        raise RoutingError(f"{type(module).__name__} does not run its blocks; {_GIVE_IDS}.")
    return states, mask.bool() if call.prompt is None else mask.bool() & call.prompt


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """Features (batch, d) in float64: the mean of states (batch, seq, d) where mask (batch, seq) is true."""
    kept = mask.to(states.device)
    states = states.double().masked_fill(~kept.unsqueeze(-1), 0)  # padding may hold anything
    return einsum(states, "batch seq d -> batch d") / kept.sum(dim=1, keepdim=True).clamp(min=1)


def _ids(context: RoutingContext, adapter: str, features: Tensor) -> Any:
    found = context.adapters[adapter]
    router: TaskRouter = found.router
    if not router.learned:
        raise RoutingError(
            "no task ids were given, and this adapter's router has learned no task yet.",
            hint=f"molora.fit_router(model, tokenizer, {{task: prompts}}) teaches it; or {_GIVE_IDS}.",
        )
    guess = router.guess(features)
    ids = [guess.ids[row] for row in guess.nearest.tolist()]
    unknown = [row for row, known in enumerate(guess.known.tolist()) if not known]
    if unknown and router.settings.unknown == "error":
        task = found.task_map.name(ids[unknown[0]])
        raise RoutingError(
            f"prompt {unknown[0]} of the batch belongs to no task this adapter knows: the likeliest is {task!r}, and it is "
            "less like that than nearly all of its own prompts.",
            hint=f"{_GIVE_IDS}; or set the router's unknown to nearest or base.",
        )
    if router.settings.unknown == "base":
        ids = [BASE_ONLY if row in unknown else task for row, task in enumerate(ids)]
    return resolve_ids(found.task_map, ids)


def _reader(module: nn.Module) -> nn.Module:
    """The part of a model that reads prompts: without its head; of an encoder-decoder, the encoder."""
    model: Any = module
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", model)

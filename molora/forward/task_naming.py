"""A prompt that comes without a task id: the adapter's router names it by what an early block of the base makes of it.

Once per prompt. The names become the call's task ids, as if the caller had given them, and stay with the key-value cache
(of an encoder-decoder: with the encoder's output). Where no expert sits at or before that block, they fall out of the
model's own forward; else the base alone reads the prompt first. Ids that a caller gives are never replaced, and training
names nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from molora.calls.call import Call, CallCache
from molora.calls.context import AdapterRouting, RoutingContext
from molora.calls.prompt import attended, is_causal, remembered
from molora.calls.task_ids import TaskIds, resolve_ids, weighed_ids
from molora.calls.task_map import BASE_ONLY
from molora.errors import ConfigError, DataError, RoutingError
from molora.forward.task_router import TaskRouter

_READ = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
_GIVE_IDS = "give routing_task_ids=[...], one per sample"
_WHOLE_GRAPH = f"one graph cannot name tasks: {_GIVE_IDS}"


class AfterBlock:
    """What follows the block that a router reads: a first pass ends there, a forward gets its task ids. A hook of it."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        call = self.context.here.call
        if call is None:
            return
        states = output[0] if isinstance(output, tuple) else output
        if call.stops_after is block:
            raise _Reached(states)
        if call.unnamed and call.begun is not None and not call.first_pass:
            self._name(call, block, states)

    @torch.compiler.disable(reason=_WHOLE_GRAPH)
    def _name(self, call: Call, block: nn.Module, states: Tensor) -> None:
        """The running call, from here on with the tasks of its samples."""
        assert call.begun is not None and call.owner is not None
        own = [name for name in call.unnamed if self.context.adapters[name].read is block]
        stream = "encoder" if _has_encoder(call.owner) else "decoder"
        features = mean_of(states, _prompt_of(call, call.owner, call.masks.get(stream), states))
        for adapter in own:
            call.begun.tasks[adapter] = _ids(self.context.adapters[adapter], features)
        unnamed = tuple(name for name in call.unnamed if name not in own)
        self.context.here.call = replace(call, tasks={**call.begun.tasks, **call.tasks}, unnamed=unnamed)


class _Reached(Exception):
    """No error: the way out of a forward that has done its work."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def install(model: nn.Module, context: RoutingContext, adapter: str, keys: Iterable[str]) -> None:
    """Watch the block that the adapter's router reads. `keys`: names of the modules that have experts."""
    found = context.adapters[adapter]
    found.read = block_at(model, found.config.router.depth)
    early = modules_until(model, found.read)
    comes_before = found.prompts is not None or any(key in early for key in keys)
    found.along = found.config.router.passes != 2 and not comes_before
    hooks = found.read._forward_hooks.values()
    if not any(isinstance(getattr(hook, "__self__", None), AfterBlock) for hook in hooks):
        found.read.register_forward_hook(AfterBlock(context).leave)


def modules_until(model: nn.Module, block: nn.Module) -> frozenset[str]:
    """Names of the modules that may have run once a block of the model's reader has: all it defines no later."""
    reader, names = _reader(model), {module: name for name, module in model.named_modules()}
    modules = list(reader.modules())
    last = max(map(modules.index, block.modules()))
    return frozenset(names[module] for module in modules[: last + 1])


def block_at(model: nn.Module, depth: float) -> nn.Module:
    """The block of the base (an encoder-decoder's encoder) after which this share of its blocks has run; at least one.

    Raises:
        ConfigError: the model does not say which its blocks are.
    """
    blocks = blocks_of(model)
    return blocks[max(1, round(depth * len(blocks))) - 1]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks that prompts run through, in order; raises as `block_at`."""
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
    return blocks


@torch.compiler.disable(reason=_WHOLE_GRAPH)
def name_tasks(context: RoutingContext, call: Call, module: nn.Module, inputs: Mapping[str, Any]) -> Call:
    """The call with the task ids of its samples, for the adapters that need them and were given none.

    Those whose router reads along in the forward stay unnamed until then.
    """
    assert call.begun is not None
    if torch.compiler.is_exporting():
        raise RoutingError("a graph that is exported cannot name tasks.", hint=f"{_GIVE_IDS}.")
    encoded, later = remembered(inputs.get("encoder_outputs")), []
    if encoded is not None:
        call.begun.tasks.update(encoded.tasks)
    for adapter in call.unnamed if encoded is None else ():
        found = context.adapters[adapter]
        # Another adapter's experts may sit before the block, and the router must read the base alone.
        if found.along and len(context.active) == 1 and inputs.get("encoder_outputs") is None:
            later.append(adapter)
            continue
        states, mask = read_base(context, call, adapter, module, inputs)
        call.begun.tasks[adapter] = _ids(found, mean_of(states, mask))
    return replace(call, tasks={**call.begun.tasks, **call.tasks}, unnamed=tuple(later))


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
    return states, _prompt_of(call, module, mask, states)


def _prompt_of(call: Call, module: nn.Module, mask: Tensor | None, states: Tensor) -> Tensor:
    """(batch, seq) true for the tokens of the prompt among those that were read; an encoder reads nothing else."""
    read = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if call.prompt is None or _has_encoder(module):
        return read
    # Labels that are the whole text, as for a perplexity, do not say where its prompt ends.
    return read & (call.prompt if call.unprompted is None else call.prompt | call.unprompted)


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """Features (batch, d) in float64: the mean of states (batch, seq, d) where mask (batch, seq) is true.

    Raises:
        DataError: they are not finite.
    """
    kept = mask.to(states.device)
    states = states.double().masked_fill(~kept.unsqueeze(-1), 0)  # padding may hold anything
    mean = einsum(states, "batch seq d -> batch d") / kept.sum(dim=1, keepdim=True).clamp(min=1)
    if not torch.isfinite(mean).all():
        raise DataError(
            "the base's hidden states of some prompts are not finite, so a task router cannot read them.",
            hint="load the base in bfloat16 or float32; float16 may overflow.",
        )
    return mean


def _ids(found: AdapterRouting, features: Tensor) -> TaskIds:
    router: TaskRouter = found.router
    if not router.learned:
        raise RoutingError(
            "no task ids were given, and this adapter's router has learned no task yet.",
            hint=f"molora.fit_router(model, tokenizer, {{task: prompts}}) teaches it; or {_GIVE_IDS}.",
        )
    guess = router.guess(features)
    named = router.named(guess)
    if None in named and router.settings.unknown == "error":
        row = named.index(None)
        task = found.task_map.name(guess.ids[int(guess.nearest[row])])
        raise RoutingError(
            f"prompt {row} of the batch belongs to no task this adapter knows: the likeliest is {task!r}, and it is "
            "less like that than nearly all of its own prompts.",
            hint=f"{_GIVE_IDS}; or set the router's unknown to nearest or base.",
        )
    ids = [BASE_ONLY if task is None else task for task in named]
    if not (router.settings.soft and found.config.gate.scope == "task"):
        return resolve_ids(found.task_map, ids)
    shares = guess.posteriors.float()
    asked = torch.tensor([task != BASE_ONLY for task in ids], device=shares.device)
    return weighed_ids(found.task_map, ids, guess.ids, shares * asked.unsqueeze(-1))


def _reader(module: nn.Module) -> nn.Module:
    """The part of a model that reads prompts: without its head; of an encoder-decoder, the encoder."""
    model: Any = module
    if _has_encoder(module) and hasattr(model, "get_encoder"):
        return model.get_encoder()
    return getattr(model, "base_model", model)


def _has_encoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))

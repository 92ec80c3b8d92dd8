"""A forward that begins a sequence gets the virtual tokens of an adapter's experts; one that goes on with a cache counts them.

Callers see nothing of it: of what a model returns for each position, that of their own positions is left, and masks, labels and
position ids are theirs. Only attention weights tell: keys of virtual tokens are among them. Installed on the base model, inside
of the hooks that open and close its call, and only where an adapter has virtual tokens.

Reference: PeftModelForCausalLM of PEFT 0.21, which does the same to the same arguments in its own forward and generate, for
prompts that all samples have. It returns logits for the virtual tokens too, drops position ids, and stands them before padding
(see `calls.prefix`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.calls.call import Call
from molora.calls.check_inputs import check_not_packed
from molora.calls.context import RoutingContext
from molora.calls.prefix import Prefix, keep_prefix, prefix_of
from molora.calls.prompt import CACHES, cache_of, named_inputs, past_length
from molora.errors import RoutingError
from molora.forward.first_pass import off
from molora.forward.mount import Mount

_REFUSED = ("token_type_ids", "pixel_values", "input_features")
_STATIC = "use a cache that grows (the default of generate), without cache_implementation='static'"
_TURNS = "start each turn of a conversation without a cache"


class PromptHooks:
    """Forward hooks of a base model.

    Args:
        context: the model's.
        arguments: names of what its forward takes.
    """

    def __init__(self, context: RoutingContext, arguments: Iterable[str]) -> None:
        self.context, self.arguments = context, frozenset(arguments)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: the call is open, and knows its tasks."""
        call = self.context.here.call
        if call is None or call.owner is not module or call.prefix is not None:
            return None
        inputs = named_inputs(module, args, kwargs)
        cache = cache_of(inputs)
        if past_length(cache) > 0:
            begun = prefix_of(cache)
            if begun is None and self._adapter(call) is not None:
                raise RoutingError(
                    "this cache was not filled behind the virtual tokens of this adapter.",
                    hint="start the generation with the adapter on, and keep one cache from the prompt on.",
                )
            return None if begun is None else ((), self._go_on(begun, past_length(cache), inputs))
        adapter = self._adapter(call)
        return None if adapter is None else ((), self._begin(adapter, call, module, inputs))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: the cache remembers, and the caller gets its own positions."""
        call = self.context.here.call
        if call is None or call.owner is not module or call.prefix is None or output is None:
            return None
        cache = cache_of(kwargs)
        cache = cache_of(output) if cache is None and hasattr(output, "get") else cache
        if cache is not None and not isinstance(cache, tuple):
            keep_prefix(cache, call.prefix)
        seq = call.shapes["decoder"].seq
        assert seq is not None
        return _own_positions(output, seq - call.prefix.tokens)

    def _adapter(self, call: Call) -> str | None:
        """The one whose virtual tokens come before the batch; None: nobody's."""
        context = self.context
        if off(context.points or ()):
            return None
        found = [name for name in context.active if context.adapters[name].prompts is not None]
        if len(found) > 1:
            raise RoutingError(
                f"adapters {', '.join(found)} have virtual tokens each, and only those of one can come first.",
                hint="make one of them active: model.set_adapter(name).",
            )
        if not found or (found[0] in call.tasks and call.tasks[found[0]].all_base):
            return None
        return found[0]

    def _begin(self, adapter: str, call: Call, module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs behind the virtual tokens, and the running call of so many more positions."""
        _check(inputs)
        x = inputs.get("inputs_embeds")
        if x is None:
            x = module.get_input_embeddings()(inputs.pop("input_ids"))  # type: ignore[operator]
        lead = x.shape[:2]
        mask = _mask(inputs, lead, x)
        found = self.context.adapters[adapter]
        vectors, given = found.prompts.of_samples(adapter, found, call, x)
        prefix = Prefix.before(found.prompts.tokens.count, mask, given.to(mask.device))
        whole = prefix.attended(mask)
        inputs |= {"inputs_embeds": prefix.embedded(x, vectors.to(x.device)), "attention_mask": whole}
        self._place(prefix, inputs, whole, prefix.tokens + lead[1])
        if isinstance(inputs.get("labels"), Tensor):
            inputs["labels"] = prefix.labelled(inputs["labels"])
        if isinstance(
            inputs.get("shift_labels"), Tensor
        ):  # moved already: each says what follows its own position
            inputs["shift_labels"] = prefix.room(inputs["shift_labels"], -100)
        kept = inputs.get("logits_to_keep")
        if isinstance(kept, Tensor):  # positions, those below 0 from the end
            inputs["logits_to_keep"] = torch.where(kept < 0, kept, kept + prefix.tokens)
        self.context.here.call = _longer(call, prefix, mask)
        return inputs

    def _go_on(self, begun: Prefix, past: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a step behind a cache that begins with virtual tokens, of which its caller knows nothing."""
        _check(inputs)
        new = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        batch, seq = new.shape[:2]
        own = past + seq - begun.tokens  # as the caller counts
        _check_count(inputs, own)
        mask = _mask(inputs, (batch, own), new)
        prefix = begun.of_batch(batch)
        whole = inputs["attention_mask"] = prefix.attended(mask)
        self._place(prefix, inputs, whole, seq)
        return inputs

    def _place(self, prefix: Prefix, inputs: dict[str, Any], mask: Tensor, newest: int) -> None:
        if "position_ids" in self.arguments:
            inputs["position_ids"] = prefix.positions(inputs.get("position_ids"), mask, newest)


def install(model: nn.Module, context: RoutingContext, adapter: str, mounts: list[Mount]) -> None:
    """Register the hooks on a base model, once. `mounts`: the adapter's, one of which may have the gate of all."""
    found = context.adapters[adapter]
    if found.config.gate.learned and found.prompts.gate is None:
        found.prompts.shared = (next(mount.gate for mount in mounts if mount.gate is not None),)
    if any(isinstance(getattr(h, "__self__", None), PromptHooks) for h in model._forward_hooks.values()):
        return
    hooks = PromptHooks(context, inspect.signature(model.forward).parameters)
    model.register_forward_pre_hook(hooks.enter, with_kwargs=True)
    model.register_forward_hook(hooks.leave, with_kwargs=True, prepend=True)


def _check(inputs: Mapping[str, Any]) -> None:
    """Raise RoutingError for arguments that have no place for virtual tokens."""
    check_not_packed(inputs)
    for name in _REFUSED:
        if inputs.get(name) is not None:
            raise RoutingError(
                f"{name} says nothing of virtual tokens.", hint=f"call the model without {name}."
            )
    if getattr(cache_of(inputs), "is_compileable", False):
        raise RoutingError("a cache of fixed size has no room for virtual tokens.", hint=f"{_STATIC}.")


def _check_count(inputs: Mapping[str, Any], own: int) -> None:
    """Raise RoutingError where the newest token is not the last of `own`: generate() counts a cache's positions as its own."""
    places = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or places is None or torch.compiler.is_compiling():
        return
    if int(places[0, -1]) != own - 1:
        raise RoutingError(
            f"the newest token's position is {int(places[0, -1])}, but behind virtual tokens this cache goes on at {own - 1}.",
            hint=f"{_TURNS}, or with an attention_mask (batch, seq) of all tokens so far.",
        )


def _mask(inputs: Mapping[str, Any], lead: tuple[int, ...], x: Tensor) -> Tensor:
    """The caller's mask of its own tokens (batch, seq), all of them where it gives none."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(*lead, dtype=torch.long, device=x.device)
    if not isinstance(mask, Tensor) or mask.shape != torch.Size(lead):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise RoutingError(
            f"attention_mask is {shape}; behind virtual tokens it must be one of the tokens, {tuple(lead)}.",
            hint=f"give (batch, seq), of all tokens so far; {_STATIC}; {_TURNS}.",
        )
    return mask


def _longer(call: Call, prefix: Prefix, mask: Tensor) -> Call:
    """The call with room for virtual tokens, which neither gates pool nor losses and statistics count."""
    shapes = {
        stream: replace(shape, seq=None if shape.seq is None else shape.seq + prefix.tokens)
        for stream, shape in call.shapes.items()
    }
    return replace(
        call,
        prefix=prefix,
        masks=dict.fromkeys(("encoder", "decoder"), prefix.room(mask)),
        shapes=shapes,
        targets=None if call.targets is None else prefix.room(call.targets),
        prompt=None if call.prompt is None else prefix.room(call.prompt),
    )


def _own_positions(output: Any, seq: int) -> Any:
    """What a model returned, without the positions of virtual tokens; the keys of attention weights stay."""
    if isinstance(output, Tensor):
        if output.dim() in (3, 4) and output.shape[-2] > seq:
            return output[..., -seq:, :]
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(_own_positions(part, seq) for part in output)
    if hasattr(output, "items"):
        for name, value in list(output.items()):
            if name not in CACHES:
                output[name] = _own_positions(value, seq)
    return output

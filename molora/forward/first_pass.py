"""Two-pass gates: the base runs first without experts, and its last hidden states are what the gate reads.

A call costs a second forward of the base, and a generation a second key-value cache, which follows the first
one: what reorders, repeats, cuts or resets the one does the same to the other. Reference: X-LoRA,
arXiv:2402.07148, which recomputes the whole prefix for each token instead.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.calls.call import Call, CallCache
from molora.calls.context import RoutingContext
from molora.calls.prompt import CACHES, cache_of, named_inputs, past_length
from molora.errors import RoutingError
from molora.forward.mount import MountPoint

_BASE = "_molora_base"  # attribute of a key-value cache: the base's own
_FOLLOWED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")


def off(points: Sequence[MountPoint]) -> bool:
    """Whether the experts take no part in the call: disabled, or merged."""
    return not points or points[0].disable_adapters or points[0].merged


def first_pass(
    context: RoutingContext, call: Call, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Call, Any, dict[str, Any]]:
    """Run the base alone; the call with its last hidden states by stream, and the model's arguments by name."""
    if all(a in call.tasks and call.tasks[a].all_base for a in context.active):
        return call, args, kwargs
    kwargs = named_inputs(module, args, kwargs)
    inputs = dict(kwargs)
    given = next((name for name in CACHES if inputs.get(name) is not None), CACHES[0])
    inputs[given] = base_cache = _base_cache(inputs.get(given))
    alone = replace(call, first_pass=True, owner=module, cache=CallCache())
    with torch.no_grad(), context.use_call(alone):
        features, cache = _run(context, module, inputs)
    features = {**call.features, **features}
    base_cache = base_cache if base_cache is not None else cache
    return replace(call, features=features, base_cache=base_cache), (), kwargs


def _run(context: RoutingContext, module: nn.Module, call: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Last hidden states (batch, seq, d) of the base by stream, and its cache; no head is run."""
    if "decoder_input_ids" in inspect.signature(module.forward).parameters:
        return _run_both(context, module, call)
    body: Any = getattr(module, "base_model", module)
    call.pop("labels", None)
    run = body.forward if body is module else body  # the module's own hooks would open a call of their own
    output = run(**_accepted(body, call))
    return dict.fromkeys(("decoder", "encoder"), output[0]), cache_of(output)


def _accepted(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    return {name: value for name, value in inputs.items() if name in parameters}


def _run_both(
    context: RoutingContext, module: nn.Module, call: dict[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    model: Any = module
    mask = call.get("attention_mask")
    if call.get("encoder_outputs") is None:
        encoder = model.get_encoder()
        encoded = encoder(**_accepted(encoder, call))[0]
    else:
        encoded = _base_encoding(context, call["encoder_outputs"][0])
    tokens = call.get("decoder_input_ids")
    if tokens is None and call.get("labels") is not None:
        tokens = _shifted(model, call["labels"])
    decoder = model.get_decoder()
    decoder = getattr(decoder, "base_model", decoder)  # of a decoder with a head of its own
    inputs = {
        "input_ids": tokens,
        "attention_mask": call.get("decoder_attention_mask"),
        "inputs_embeds": call.get("decoder_inputs_embeds"),
        "encoder_hidden_states": encoded,
        "encoder_attention_mask": mask,
        "past_key_values": call["past_key_values"],
        "use_cache": call.get("use_cache"),
    }
    output = decoder(**_accepted(decoder, inputs))
    return {"decoder": output[0], "encoder": encoded}, output.get("past_key_values")


def _shifted(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads when it learns these labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)


def remember(context: RoutingContext, call: Call, kwargs: dict[str, Any], output: Any) -> None:
    """Tie the base's cache to the call's own, and a lone encoder's base encoding to its output."""
    if (call.base_cache is None and "encoder" not in call.features) or not hasattr(output, "get"):
        return
    cache = cache_of(kwargs)
    cache = cache if cache is not None else cache_of(output)
    if cache is not None and call.base_cache is not None and not hasattr(cache, _BASE):
        _tie(cache, call.base_cache)
    if "encoder" in call.features and output.get("last_hidden_state") is not None:
        context.here.encoded = (output.last_hidden_state, call.features["encoder"], None)


def _base_cache(cache: Any) -> Any:
    """The base's own cache beside the call's; an empty one for an empty one."""
    if cache is None:
        return None
    if past_length(cache) == 0:
        base = copy.deepcopy(cache)
        _tie(cache, base)
        return base
    base = getattr(cache, _BASE, None)
    if base is None:
        raise RoutingError(
            "a two-pass gate needs the base's own key-value cache, and this cache was filled without one.",
            hint="start the generation with the adapter on, and keep one cache from the prompt on.",
        )
    return base


def _tie(cache: Any, base: Any) -> None:
    setattr(cache, _BASE, base)
    for name in _FOLLOWED:
        original = getattr(cache, name, None)
        if original is None:
            continue

        @functools.wraps(original)
        def both(
            *args: Any, _first: Any = original, _second: Any = getattr(base, name), **kwargs: Any
        ) -> Any:
            _second(*args, **kwargs)
            return _first(*args, **kwargs)

        setattr(cache, name, both)


def _base_encoding(context: RoutingContext, given: Tensor) -> Tensor:
    """The base's encoding of what the encoder encoded with experts last, repeated as that was for beams."""
    if context.here.encoded is not None:
        adapted, base, seen = context.here.encoded
        if given is seen:
            return base
        repeats, rest = divmod(len(given), len(adapted))
        if not rest and given.shape[1:] == adapted.shape[1:]:
            repeated = adapted if given is adapted else adapted.repeat_interleave(repeats, dim=0)
            if torch.equal(repeated, given):
                base = base.repeat_interleave(repeats, dim=0)
                context.here.encoded = (given, base, given)
                return base
    raise RoutingError(
        "a two-pass gate needs the base's encoding of encoder_outputs, which is known only right after the encoder ran.",
        hint="call the model with input_ids, or generate() as a whole.",
    )

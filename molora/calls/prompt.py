"""What one call of a model tells the gates: masks, targets, where its prompt ends, and what its cache remembers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.calls.call import Call, PromptMemory
from molora.calls.check_inputs import check_not_packed, check_samples, say_no_prompt, say_unmasked
from molora.calls.context import RoutingContext
from molora.calls.request import RoutingRequest
from molora.calls.shapes import has_two_sequences, shapes_of
from molora.errors import RoutingError

CACHES = ("past_key_values", "cache_params")
_MEMORY = "_molora_prompt"  # attribute of a key-value cache: the PromptMemory of the prompt it begins with


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def with_inputs(
    context: RoutingContext,
    call: Call,
    request: RoutingRequest,
    module: nn.Module,
    inputs: Mapping[str, Any],
) -> Call:
    """The call with all that its gates and losses may need of the model's inputs."""
    masks, labels = _masks(module, inputs), inputs.get("labels")
    targets = labels != -100 if isinstance(labels, Tensor) and labels.dim() == 2 else None
    call = replace(call, masks=masks, targets=targets, shapes=shapes_of(module, inputs))
    if not torch.compiler.is_compiling():
        check_samples(call, request, inputs)
    gates = [context.adapters[a].config.gate for a in context.active]
    scopes = {gate.scope for gate in gates} | {gate.blend for gate in gates}
    wanted = context.source is not None and "external" in scopes and "external" not in call.features
    if "sequence" not in scopes and not wanted and not call.unnamed:
        return call
    check_not_packed(inputs)
    if request.prompt_mask is None and request.prompt_length is None:  # generate() drops a mask of ones alone
        say_unmasked(inputs)
    cache = cache_of(inputs)
    if past_length(cache) > 0:
        memory = remembered(cache) or PromptMemory()
        named = {name: ids for name, ids in memory.tasks.items() if name in call.unnamed}
        call = replace(call, continued=memory, tasks={**call.tasks, **named})
        if not wanted or memory.features is None:
            return call
        return replace(call, features={**call.features, "external": memory.features})
    begun = PromptMemory()
    prompt = _prompt(module, call, request, inputs)
    unprompted = _unprompted(module, call, request, prompt)
    gated = "sequence" in scopes or wanted
    if unprompted is not None and gated and not context.labels_seen and not torch.compiler.is_compiling():
        context.labels_seen = True
        say_no_prompt(unprompted)
    call = replace(call, begun=begun, prompt=prompt, unprompted=unprompted)
    if not wanted:
        return call
    begun.features = _work_out(context, call, inputs)
    return replace(call, features={**call.features, "external": begun.features})


def _work_out(context: RoutingContext, call: Call, inputs: Mapping[str, Any]) -> Tensor:
    """Features (batch, feature) of each sample's prompt, from the source that was set."""
    tokens = inputs.get("input_ids")
    if tokens is None or "decoder_input_ids" in inputs:
        raise RoutingError(
            "the feature source reads the prompt's tokens, which this call does not give.",
            hint="pass routing_features=..., or call a decoder-only model or an encoder with input_ids.",
        )
    mask = call.prompt if call.prompt is not None else call.masks.get("decoder")
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    prompts = [row[keep].tolist() for row, keep in zip(tokens, kept, strict=True)]
    assert context.source is not None
    return context.source(prompts).to(tokens.device)


def attach(call: Call, kwargs: Mapping[str, Any], output: Any) -> None:
    """Let the call's cache remember what the gates decided on its prompt."""
    begun = call.begun
    if begun is None or not (begun.routings or begun.logits or begun.features is not None or begun.tasks):
        return
    cache = cache_of(kwargs)
    if cache is None and hasattr(output, "get"):
        cache = cache_of(output)
        if cache is None and begun.tasks and "last_hidden_state" in output:
            cache = output  # of an encoder, which decoders go on from
    if cache is not None and not isinstance(cache, tuple):
        setattr(cache, _MEMORY, begun)


def remembered(cache: Any) -> PromptMemory | None:
    """What a key-value cache, or an encoder's output, remembers of its prompt."""
    return getattr(cache, _MEMORY, None)


def attended(inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch, seq) the mask of what is read first, also where generate() has expanded a prompt's for a cache of fixed size."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):  # by the kind of attention of a block
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor) or mask.dim() == 2:
        return mask
    if (
        mask.dim() == 3
        and isinstance(inputs.get("input_ids"), Tensor)
        and mask.shape == inputs["input_ids"].shape
    ):
        return mask.flatten(0, 1)  # the choices of a question are samples
    if mask.dim() != 4 or past_length(cache_of(inputs)) > 0:
        return None
    own = mask[:, 0].diagonal(dim1=1, dim2=2)  # any token but padding sees itself, however far it looks back
    return own if own.dtype == torch.bool else own == 0


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or in its output, whatever the family calls it."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def past_length(cache: Any) -> int:
    """Positions a cache holds already; of one that keeps a state and no positions 1, once it has begun."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a state-space model's
        return int(len(cache) > 0 and cache.has_previous_state())


def is_causal(module: nn.Module) -> bool:
    """Whether later tokens are predicted from earlier ones: then a gate may pool the prompt only."""
    return bool(getattr(module, "can_generate", lambda: False)())


def _prompt(
    module: nn.Module, call: Call, request: RoutingRequest, inputs: Mapping[str, Any]
) -> Tensor | None:
    """(batch, seq) true for the tokens of the decoder that gates of sequence scope may pool; None: its mask says.

    What the caller gives; else, in a causal model, the tokens before the first target, at least one. Without
    targets the whole input is the prompt, or as much of it as a running generation began with.
    """
    if request.prompt_mask is not None:
        given = request.prompt_mask.bool()
        seen = inputs.get("input_ids")
        grown = request.prompt_length is not None and isinstance(seen, Tensor)
        # A generation without a cache reads the prompt again, with what it has written since.
        return F.pad(given, (0, max(0, seen.shape[1] - given.shape[1]))) if grown else given  # type: ignore[union-attr]
    if not is_causal(module):
        return None
    mask = call.masks.get("decoder")
    if call.targets is not None:
        targets = call.targets.int()
        if getattr(module.config, "is_encoder_decoder", False):  # position t predicts target t
            return targets.cumsum(dim=1) - targets == 0
        before = targets.cumsum(dim=1) == 0
        attended = torch.ones_like(before) if mask is None else mask.bool()
        # The first token is no target, whatever its label: nothing comes before it to predict it from.
        first = attended & (attended.cumsum(dim=1) == 1)
        return (before & attended) | first
    if request.prompt_length is None:
        return None
    tokens = mask if mask is not None else inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is None:
        tokens = inputs["inputs_embeds"][..., 0]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    within = (place < request.prompt_length).expand(tokens.shape[0], -1)
    return within if mask is None else within & mask.bool()


def _unprompted(
    module: nn.Module, call: Call, request: RoutingRequest, prompt: Tensor | None
) -> Tensor | None:
    """(batch, 1) true for the samples of a decoder-only model whose very first token is a target; None: nothing tells.

    Only there is a target part of the `_prompt`: the first token stands for one.
    """
    if request.prompt_mask is not None or call.targets is None or prompt is None:
        return None
    if getattr(module.config, "is_encoder_decoder", False):
        return None
    return (prompt & call.targets).any(dim=1, keepdim=True)


def _masks(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    mask = attended(inputs)
    if not has_two_sequences(module):
        return dict.fromkeys(("encoder", "decoder"), mask) if isinstance(mask, Tensor) else {}
    decoder = inputs.get("decoder_attention_mask")
    if decoder is None and isinstance(inputs.get("labels"), Tensor):
        decoder = inputs["labels"] != -100
    found = {"encoder": mask, "decoder": decoder}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def generation_start(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Positions of the decoder that a generation begins with."""
    prompt: Any = kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
    if getattr(model.config, "is_encoder_decoder", False):
        prompt = kwargs.get("decoder_input_ids")
    elif args:
        prompt = args[0]
    return 1 if prompt is None else prompt.shape[1]

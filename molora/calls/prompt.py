"""What one call of a model tells the gates: masks, targets, where its prompt ends, and what its cache remembers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.calls.call import RoutingContext, RoutingRequest, RoutingState
from molora.errors import RoutingError

# Attributes of a key-value cache: what was decided on, and worked out from, the prompt it begins with.
_KEPT, _FEATURES = "_molora_prompt", "_molora_features"


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def read_inputs(
    context: RoutingContext,
    state: RoutingState,
    request: RoutingRequest,
    module: nn.Module,
    inputs: Mapping[str, Any],
) -> None:
    """Note in the state what the gates and losses of this call may need."""
    state.masks = _masks(module, inputs)
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        state.targets = labels != -100
    gates = [context.adapters[a].config.gate for a in context.active]
    scopes = {gate.scope for gate in gates} | {gate.blend for gate in gates}
    wanted = context.source is not None and "external" in scopes and "external" not in state.features
    if "sequence" not in scopes and not wanted:
        return
    cache = inputs.get("past_key_values")
    if past_length(cache) > 0:
        state.kept = getattr(cache, _KEPT, {})
        if wanted and hasattr(cache, _FEATURES):
            state.features["external"] = getattr(cache, _FEATURES)
        return
    state.keep = {}
    state.prompt = _prompt(module, state, request, inputs)
    if wanted:
        state.features["external"] = state.worked_out = _work_out(context, state, inputs)


def _work_out(context: RoutingContext, state: RoutingState, inputs: Mapping[str, Any]) -> Tensor:
    """Features (batch, feature) of each sample's prompt, from the source that was set."""
    tokens = inputs.get("input_ids")
    if tokens is None or "decoder_input_ids" in inputs:
        raise RoutingError(
            "the feature source reads the prompt's tokens, which this call does not give.",
            hint="pass routing_features=..., or call a decoder-only model or an encoder with input_ids.",
        )
    mask = state.prompt if state.prompt is not None else state.masks.get("decoder")
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    prompts = [row[keep].tolist() for row, keep in zip(tokens, kept, strict=True)]
    return context.source(prompts).to(tokens.device)


def attach(state: RoutingState, kwargs: Mapping[str, Any], output: Any) -> None:
    """Let the call's cache remember what the gates decided on its prompt."""
    if not state.keep and state.worked_out is None:
        return
    cache = kwargs.get("past_key_values")
    if cache is None and hasattr(output, "get"):
        cache = output.get("past_key_values")
    if cache is not None and not isinstance(cache, tuple):
        setattr(cache, _KEPT, state.keep)
        if state.worked_out is not None:
            setattr(cache, _FEATURES, state.worked_out)


def past_length(cache: Any) -> int:
    """Positions a key-value cache holds already."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def is_causal(module: nn.Module) -> bool:
    """Whether later tokens are predicted from earlier ones: then a gate may pool the prompt only."""
    return bool(getattr(module, "can_generate", lambda: False)())


def _prompt(
    module: nn.Module, state: RoutingState, request: RoutingRequest, inputs: Mapping[str, Any]
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
    mask = state.masks.get("decoder")
    if state.targets is not None:
        targets = state.targets.int()
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


def _masks(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    mask = inputs.get("attention_mask")
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return {"decoder": mask} if isinstance(mask, Tensor) else {}
    decoder = inputs.get("decoder_attention_mask")
    if decoder is None and isinstance(inputs.get("labels"), Tensor):
        decoder = inputs["labels"] != -100
    found = {"encoder": mask, "decoder": decoder}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}

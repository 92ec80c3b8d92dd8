"""What a call of a model is refused for: samples that do not fit what was asked for, and sequences without borders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from molora.calls.call import Call
from molora.calls.request import RoutingRequest
from molora.errors import RoutingError

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments with which several sequences stand in one row of a batch."""


def check_samples(call: Call, request: RoutingRequest, inputs: Mapping[str, Any]) -> None:
    """Raise RoutingError where what was given per sample is not for the samples of the batch.

    One row serves all of them. A generation repeats each sample in place: for its beams, or several sequences.
    """
    shape = call.shapes.get("decoder")
    if shape is None or shape.batch == 0 or _generates(request, inputs):
        return
    for what, samples in _given(call, request):
        if samples not in (1, shape.batch, shape.batch // shape.choices):
            raise RoutingError(
                f"got {what} for {samples} samples, but the batch has {shape.batch}; give one per sample.",
                hint="samples are repeated in place only inside generate(), for beams and num_return_sequences.",
            )


def _given(call: Call, request: RoutingRequest) -> Iterator[tuple[str, int]]:
    for ids in call.tasks.values():
        yield "task ids", ids.ids.shape[0]
    if request.features is not None:
        yield "routing features", request.features.shape[0]
    if request.prompt_mask is not None:
        yield "a routing prompt mask", request.prompt_mask.shape[0]


def _generates(request: RoutingRequest, inputs: Mapping[str, Any]) -> bool:
    """Whether the call is a step of a generation, which may have begun without passing through the tuner."""
    if request.prompt_length is not None:
        return True
    names = ("past_key_values", "cache_params", "encoder_outputs")
    if any(inputs.get(name) is not None for name in names):
        return True
    return inputs.get("use_cache") is not None and not torch.is_grad_enabled()


def check_not_packed(inputs: Mapping[str, Any]) -> None:
    """Raise RoutingError where a row of the batch holds several sequences: a gate that pools would mix them."""
    named = [name for name in _PACKED if inputs.get(name) is not None]
    if not named and not (not torch.compiler.is_compiling() and _restarts(inputs)):
        return
    found = f"{named[0]} is given" if named else "position_ids begin anew within a row"
    raise RoutingError(
        f"this batch is packed ({found}): several sequences stand in one row, and what the adapter decides by sequence "
        "would mix them.",
        hint="pad the batch instead of packing it, or use gate.scope='token'.",
    )


def say_unmasked(inputs: Mapping[str, Any]) -> None:
    """Warn where a batch comes without a mask: what pools a sequence reads its padding too, if it has any."""
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if mask is None and isinstance(tokens, Tensor) and tokens.dim() == 2 and min(tokens.shape) > 1:
        warnings.warn(
            "a batch came without attention_mask, and this adapter decides by sequence: padding, if there is any, is read "
            "as text. Pass the mask, or one sample at a time (lm-eval: batch_size=1).",
            stacklevel=2,
        )


def say_no_prompt(unprompted: Tensor) -> None:
    """Warn where a gate would read the prompt of samples (batch, 1) of which some have none."""
    if type(unprompted) is Tensor and unprompted.any():  # a memory estimate has no values
        warnings.warn(
            "labels begin with the first token, so no token is a prompt, and a gate that decides by the prompt sees the first "
            "token alone. Set the labels of prompts to -100, or pass routing_prompt_mask.",
            stacklevel=2,
        )


def _restarts(inputs: Mapping[str, Any]) -> bool:
    places, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(places, Tensor) or places.dim() != 2 or places.shape[1] < 2:
        return False
    falls = places[:, 1:] < places[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == places.shape:  # positions of padding mean nothing
        falls = falls & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(falls.any())

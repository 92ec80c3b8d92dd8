"""Shape: how many samples, of how many tokens each, one sequence of a call holds, and what its mask says of a layer's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_RIGHT_PADDERS = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")
"""Methods of models that lengthen their input to a multiple of something, at its end."""

_FRAMES = "_get_feature_vector_attention_mask"
"""Method of speech models: which of their frames a mask of the sound leaves."""


@dataclass(frozen=True, eq=False)
class Shape:
    """One sequence of a call.

    Attributes:
        batch: samples, of which several may come from one that the caller gave: the choices of a question.
        seq: tokens of each; None where the model makes positions of its own: of frames, or of patches.
        choices: how many of the batch's samples belong to one that the caller gave.
        kept: positions that the model's head reads, where the call names their number.
        model: whose call it is.
    """

    batch: int
    seq: int | None
    choices: int
    kept: int | None
    model: nn.Module

    def fitted(self, mask: Tensor | None, length: int) -> Tensor | None:
        """The mask (batch, positions) of the call for rows of `length` positions per sample.

        None: all of them count, or nothing says which do.
        """
        if self.seq is None:
            return None if mask is None else self._frames(mask, length)
        if mask is not None and mask.shape[1] > self.seq:  # a decoding step sees the newest positions only
            mask = mask[:, mask.shape[1] - self.seq :]
        if length > self.seq and self._pads_right:
            device = next(self.model.parameters()).device
            whole = torch.ones(self.batch, self.seq, device=device) if mask is None else mask
            return F.pad(whole, (0, length - whole.shape[1]))
        if mask is None or mask.shape[1] == length:
            return mask
        return mask[:, mask.shape[1] - length :] if length == self.kept else None

    def _frames(self, mask: Tensor, length: int) -> Tensor | None:
        if mask.shape[1] == length:
            return mask
        for module in (self.model, *_parts(self.model)):
            if hasattr(module, _FRAMES):
                return getattr(module, _FRAMES)(length, mask)
        return None

    @property
    def _pads_right(self) -> bool:
        return any(
            hasattr(module, name) for module in (self.model, *_parts(self.model)) for name in _RIGHT_PADDERS
        )


def _parts(model: Any) -> list[Any]:
    """The body of a model with a head, and its encoder."""
    body = getattr(model, "base_model", None)
    encoder = model.get_encoder() if has_two_sequences(model) else None
    return [module for module in (body, encoder) if module is not None]


def shapes_of(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Shape]:
    """By stream, the shape of what a call gives to read."""
    kept = inputs.get("logits_to_keep")
    kept = kept if isinstance(kept, int) and kept > 0 else None
    read = _shape(module, kept, inputs.get("input_ids"), inputs.get("inputs_embeds")) or _signal(
        module, inputs
    )
    if not has_two_sequences(module):
        return {} if read is None else dict.fromkeys(("encoder", "decoder"), read)
    encoded = inputs.get("encoder_outputs")
    if encoded is not None:
        states = encoded[0]
        read = Shape(states.shape[0], states.shape[1], 1, None, module)
    written = _shape(module, kept, inputs.get("decoder_input_ids"), inputs.get("decoder_inputs_embeds"))
    labels = inputs.get("labels")
    if written is None and isinstance(labels, Tensor) and labels.dim() == 2:
        written = Shape(labels.shape[0], labels.shape[1], 1, None, module)
    found = {"encoder": read, "decoder": written if written is not None else read}
    return {stream: shape for stream, shape in found.items() if shape is not None}


def has_two_sequences(module: Any) -> bool:
    """Whether a model has an encoder and a decoder; one that is called on its own may share the config of the whole."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return False
    return hasattr(module, "encoder") or hasattr(getattr(module, "base_model", None), "encoder")


def _shape(module: nn.Module, kept: int | None, ids: Any, embeds: Any) -> Shape | None:
    if isinstance(ids, Tensor):
        lead = ids.shape
    elif isinstance(embeds, Tensor):
        lead = embeds.shape[:-1]
    else:
        return None
    if len(lead) < 2:
        return None
    choices = prod(lead[1:-1])
    return Shape(lead[0] * choices, lead[-1], choices, kept, module)


def _signal(module: nn.Module, inputs: Mapping[str, Any]) -> Shape | None:
    """Of sound or images: samples alone are known."""
    name = getattr(module, "main_input_name", None)
    found = inputs.get(name) if isinstance(name, str) else None
    return (
        Shape(found.shape[0], None, 1, None, module)
        if isinstance(found, Tensor) and found.dim() > 1
        else None
    )

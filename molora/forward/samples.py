"""Some tokens of a layer and where they went: what the contrastive loss compares the experts' outputs on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molora.calls.call import Call
from molora.calls.task_ids import spread
from molora.forward.mount import Mount

_SAMPLED = 64  # tokens per layer


@torch.no_grad()
def note_sample(mount: Mount, call: Call, x: Tensor, weights: Tensor) -> None:
    """Keep some tokens, evenly spread over those that count, and the expert each went to most.

    Args:
        mount: where; nothing is kept unless its adapter has the loss.
        call: the current one, whose cache takes the sample.
        x: (batch, ..., d_in) the layer's input.
        weights: over the experts in use, (tokens, expert), (samples, expert) or (1, expert).
    """
    if "contrastive" not in mount.config.aux_losses:
        return
    lead = x.shape[:-1]
    of_response = mount.config.aux_settings("contrastive")["mask"] == "response"
    mask = (call.response if of_response else call.mask)(mount.stream, lead)
    rows = torch.arange(math.prod(lead), device=x.device) if mask is None else mask.nonzero().squeeze(-1)
    rows = rows[:: max(1, len(rows) // _SAMPLED)][:_SAMPLED]
    task_map, experts = mount.task_map, mount.experts(call)
    columns = range(len(task_map.experts)) if experts is None else experts
    gated = [c for c, i in enumerate(columns) if task_map.gated is None or i in task_map.gated]
    if not gated:
        return
    best = spread(weights[:, gated].argmax(dim=-1), lead).expand(math.prod(lead))[rows]
    chosen = torch.tensor([columns[c] for c in gated], device=x.device)[best]
    call.cache.samples[mount.place] = x.detach().reshape(-1, x.shape[-1])[rows], chosen

"""Which experts each token of a text meets, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.calls.token_record import TokenRecord
from molora.data.clusters import inference
from molora.tuner.api import find_context


@dataclass(frozen=True)
class TokenView:
    """weights: layer -> (token, expert) mean weight over the layer's gates, as nested lists."""

    tokens: list[str]
    experts: list[str]
    weights: dict[str, list[list[float]]]

    def top(self, layer: str, token: int) -> tuple[str, float]:
        """The expert with the largest weight there, and that weight."""
        row = self.weights[layer][token]
        place = max(range(len(row)), key=row.__getitem__)
        return self.experts[place], row[place]


def token_view(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int] = ()
) -> TokenView:
    """The weights that a decoder-only model's gates give each token of a prompt and an answer (token ids), as in training.

    Gates that read the sequence read the prompt alone.
    """
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    labels = torch.tensor([[-100] * len(prompt) + list(answer)], device=model.device)
    record = TokenRecord()
    with inference(model), find_context(model).record(record):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels if len(answer) else None)
    layers: dict[str, list[Tensor]] = {}
    for gate, weights in record.weights.items():
        layers.setdefault(_layer(gate), []).append(weights)
    texts = [str(tokenizer.decode([token])) for token in (*prompt, *answer)]
    means = {layer: torch.stack(found).mean(0).tolist() for layer, found in layers.items()}
    return TokenView(texts, list(record.experts), means)


def _layer(gate: str) -> str:
    """The number of its block, as statistics have it; a gate of all layers by its name."""
    return next((part for part in gate.split(".") if part.isdigit()), gate)

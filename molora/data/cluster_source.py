"""ClusterSource: features for gates of external scope, computed from each call's prompt (MoCLE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molora.data.clusters import TextClusters, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClusterSource:
    """Prompt tokens -> the prompt's cluster as a one-hot feature (sample, cluster).

    Attach it with `molora.set_feature_source(model, source)`; from then on no call needs `routing_features`. `encoder`
    is the one the clusters were fitted with, not part of the adapter; `tokenizer` is the base's, to decode prompts.
    Prompts seen before are not encoded again.
    """

    def __init__(
        self,
        clusters: TextClusters,
        encoder: nn.Module,
        encoder_tokenizer: Callable[..., Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.clusters = clusters
        self.encoder = encoder
        self.encoder_tokenizer = encoder_tokenizer
        self.tokenizer = tokenizer
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Features (sample, cluster) float32, on the CPU, of prompts given as token ids."""
        texts = [str(self.tokenizer.decode(list(prompt), skip_special_tokens=True)) for prompt in prompts]
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        if fresh:
            found = self.clusters.one_hot(encode(fresh, self.encoder, self.encoder_tokenizer))
            self._known.update(zip(fresh, found, strict=True))
        return torch.stack([self._known[text] for text in texts])

    def __deepcopy__(self, memo: dict[int, Any]) -> ClusterSource:
        return self  # only its cache ever changes

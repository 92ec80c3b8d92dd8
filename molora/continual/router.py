"""PrototypeRouter: names the task of a sample that comes without an id, by the nearest of some prototypes per task.

`features` are what it reads: hidden states of the base without experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.data.clusters import TextClusters, inference, mean_vector
from molora.data.collate import pad_token, padded_batches

SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity, so that few samples are enough


class PrototypeRouter:
    """k-means centres of each task's frozen features; a sample belongs to the task of the nearest one.

    Needs no old data: it keeps a task's centres and adds the spread around them to one covariance that all tasks share.
    Metric "covariance" measures distances by its inverse (Mahalanobis); under "euclidean" a new task never changes the
    answer for samples that stay nearest to an older centre. Reference: CoLoR, arXiv:2311.17601, which measures absolute
    distances to 5 centres.
    """

    def __init__(self, clusters: int = 20, metric: str = "covariance") -> None:
        self.clusters = clusters
        self.metric = metric
        self.centres: dict[str, Tensor] = {}  # task -> (cluster, d) float32
        self.spreads: dict[str, Tensor] = {}  # task -> (d, d) mean of (x - centre)(x - centre)ᵀ

    def fit(self, task: str, features: Tensor, seed: int = 0) -> None:
        """Learn or replace a task's centres from features (sample, d); their order does not matter."""
        rows = features.tolist()
        features = features[sorted(range(len(rows)), key=rows.__getitem__)].float()
        different = len(torch.unique(features, dim=0))
        found = TextClusters.fit(features, min(self.clusters, different), seed)
        self.centres[task] = found.centroids
        if self.metric == "covariance":
            rest = features - found.centroids[found.assign(features)]
            self.spreads[task] = rest.t() @ rest / len(rest)

    def predict(self, features: Tensor) -> list[str]:
        """The known task of each row of features (sample, d)."""
        names = list(self.centres)
        scale = self._scale()
        points = features.float() if scale is None else features.float() @ scale
        nearest = []
        for centres in self.centres.values():
            centres = centres if scale is None else centres @ scale
            distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
            nearest.append(distances.min(dim=1).values)
        return [names[i] for i in torch.stack(nearest, dim=1).argmin(dim=1).tolist()]

    def _scale(self) -> Tensor | None:
        """(d, d) that makes the shared covariance the identity; None for plain distances."""
        if self.metric != "covariance":
            return None
        shared = torch.stack(list(self.spreads.values())).mean(dim=0).double()
        level = shared.trace() / len(shared)
        if level == 0:  # every sample is a centre of its own
            return None
        shared = (1 - SHRINKAGE) * shared + SHRINKAGE * level * torch.eye(len(shared), dtype=shared.dtype)
        return torch.linalg.cholesky(torch.linalg.inv(shared)).float()

    def tensors(self) -> dict[str, Tensor]:
        """The centres by task, and their spreads."""
        spreads = {f"spreads/{task}": spread for task, spread in self.spreads.items()}
        return {f"centres/{task}": centres for task, centres in self.centres.items()} | spreads

    def restore(self, tensors: Mapping[str, Tensor], order: Sequence[str]) -> None:
        """Undo `tensors`; `order` is that of the tasks, which a file does not keep."""
        self.centres = {task: tensors[f"centres/{task}"] for task in order if f"centres/{task}" in tensors}
        self.spreads = {task: tensors[f"spreads/{task}"] for task in order if f"spreads/{task}" in tensors}


def features(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    depth: float = 1.0,
) -> Tensor:
    """Frozen features (sample, d) of prompts (token ids): mean hidden states of the base without experts, of unit length.

    `depth`: 0 are the embeddings, 1 the last layer's output, 0.5 that of the middle layer.
    """
    rows: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    base = model.get_base_model()
    reader = base.get_encoder() if getattr(base.config, "is_encoder_decoder", False) else base
    with inference(model), model.disable_adapter():
        for part, ids, mask in padded_batches(prompts, pad_token(tokenizer), batch_size, device):
            out = reader(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
            layer = round(depth * (len(out.hidden_states) - 1))
            rows.update(zip(part, mean_vector(out.hidden_states[layer], mask).cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(prompts))])

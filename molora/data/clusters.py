"""Clusters of texts, which take the place of tasks where the data has no task labels.

MoCLE (arXiv:2312.12379): k-means over sentence embeddings of the instructions; a text's cluster then decides
its experts. Axis names: text cluster d.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from molora.disk.atomic import write_file
from molora.errors import AdapterError, ConfigError, DataError

_RESTARTS = 10  # k-means keeps the best of these runs: a single one may split a cluster and merge two others


def need_kmeans(what: str) -> None:
    """Raise ConfigError where scikit-learn is missing, before `what` has cost anything."""
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{what}: k-means needs scikit-learn, which is not installed.",
            hint="pip install 'molora[cluster]'",
        ) from None


@dataclass(frozen=True, eq=False)
class TextClusters:
    """Centroids (cluster, d), float32, of clusters of text embeddings."""

    centroids: Tensor

    @property
    def num_clusters(self) -> int:
        return self.centroids.shape[0]

    @classmethod
    def fit(cls, embeddings: Tensor, num_clusters: int, seed: int = 0) -> TextClusters:
        """k-means of `embeddings` (text, d); the same clusters for the same seed.

        Raises ConfigError where scikit-learn is missing or there are fewer different texts than clusters, DataError for
        embeddings of another shape, or not finite.
        """
        need_kmeans("clusters of texts")
        from sklearn.cluster import KMeans

        _check(embeddings)
        different = torch.unique(embeddings.detach().float(), dim=0).shape[0]
        if not 1 <= num_clusters <= different:
            raise ConfigError(
                f"num_clusters is {num_clusters}; allowed: 1 to {different}, the number of different embeddings."
            )
        means = KMeans(num_clusters, n_init=_RESTARTS, random_state=seed)
        means.fit(embeddings.detach().double().cpu().numpy())
        return cls(torch.from_numpy(means.cluster_centers_).float())

    def assign(self, embeddings: Tensor) -> Tensor:
        """Nearest cluster of each of `embeddings` (text, d), as (text,) int64; the lowest index on ties."""
        _check(embeddings, self.centroids.shape[1])
        centroids = self.centroids.to(embeddings.device)
        # A matrix product would be faster, but a text's rounded distances would depend on how many texts there are.
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(embeddings.detach().float(), centroids, compute_mode=exact).argmin(dim=1)

    def one_hot(self, embeddings: Tensor) -> Tensor:
        """The nearest cluster of each of `embeddings` (text, d) as weights (text, cluster), float32."""
        return F.one_hot(self.assign(embeddings), self.num_clusters).float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file atomically; creates its folder."""
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({"centroids": self.centroids.detach().float().cpu().contiguous()}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextClusters:
        """Read what `save` wrote; AdapterError where the file is missing, damaged, or holds something else."""
        try:
            tensors = load(Path(path).read_bytes())
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror}.") from error
        except SafetensorError as error:
            raise AdapterError(f"{path} is damaged: {error}.", hint="copy it again.") from error
        centroids = tensors.get("centroids")
        if centroids is None or len(tensors) > 1:
            raise AdapterError(f"{path} holds the tensors {sorted(tensors)}; expected 'centroids' alone.")
        if centroids.dtype != torch.float32 or centroids.ndim != 2 or not centroids.numel():
            found = f"{centroids.dtype} {tuple(centroids.shape)}"
            raise AdapterError(f"{path}: centroids are {found}; expected torch.float32 (cluster, d).")
        if not torch.isfinite(centroids).all():
            raise AdapterError(f"{path}: centroids are not all finite.", hint="copy it again.")
        return cls(centroids)


def encode(
    texts: Sequence[str],
    model: nn.Module,
    tokenizer: Callable[..., Mapping[str, Any]],
    batch_size: int = 64,
) -> Tensor:
    """Sentence embeddings (text, d), float32 on the CPU: the mean of a text's last hidden states, of unit length.

    The model is any Hugging Face encoder whose output has `last_hidden_state`; its tokenizer truncates texts to its
    own maximum length. A text without tokens gets zeros. Raises DataError for no texts or a batch size below 1.
    """
    if not texts or batch_size < 1:
        raise DataError(f"{len(texts)} texts in batches of {batch_size}; allowed: 1 or more of both.")
    device = next(model.parameters()).device
    rows = []
    with inference(model):
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            tokens = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            inputs = {name: tensor.to(device) for name, tensor in tokens.items()}
            rows.append(mean_vector(model(**inputs).last_hidden_state, inputs["attention_mask"]).cpu())
    return torch.cat(rows)


def mean_vector(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `hidden` (text, seq, d) where `mask` (text, seq) is set, of unit length: (text, d) float32."""
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    kept = hidden.float().masked_fill(~mask.bool().unsqueeze(-1), 0)
    mean = einsum(kept, "text seq d -> text d") / mask.bool().sum(1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module has its own mode back, unlike with `model.train()`."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _check(embeddings: Tensor, d: int | None = None) -> None:
    if embeddings.ndim != 2 or (d is not None and embeddings.shape[1] != d):
        expected = "(text, d)" if d is None else f"(text, {d})"
        raise DataError(f"embeddings are {tuple(embeddings.shape)}; expected {expected}.")
    if not torch.isfinite(embeddings).all():
        rows = torch.isfinite(embeddings).all(dim=1).logical_not().nonzero().flatten().tolist()
        raise DataError(f"embeddings are not finite for the texts {rows[:10]}.")

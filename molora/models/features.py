"""The feature source a recipe names: clusters fitted on the training prompts, kept with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.config.run import FeaturesConfig
from molora.data.cluster_source import ClusterSource
from molora.data.clusters import TextClusters, encode
from molora.data.module import MoLoraDataModule
from molora.errors import ConfigError
from molora.tuner.api import set_feature_source

CLUSTERS_FILE = "clusters.safetensors"


def fit_features(
    config: RunConfig, model: PeftModel, data: MoLoraDataModule, tokenizer: PreTrainedTokenizerBase
) -> TextClusters | None:
    """Cluster the training prompts and attach the source; None where the recipe has no `features`.

    Raises ConfigError for no such encoder, scikit-learn missing, or fewer different prompts than clusters.
    """
    if config.features is None:
        return None
    encoder, encoder_tokenizer = _encoder(config.features)
    prompts = [example.prompt for task in data.tasks for example in data.examples(task.name, "train")]
    texts = sorted({str(tokenizer.decode(list(prompt), skip_special_tokens=True)) for prompt in prompts})
    embeddings = encode(texts, encoder, encoder_tokenizer)
    clusters = TextClusters.fit(embeddings, config.features.num_clusters, config.seed)
    set_feature_source(model, ClusterSource(clusters, encoder, encoder_tokenizer, tokenizer))
    return clusters


def load_features(
    config: RunConfig, folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Attach the source of a run, from the clusters in its folder."""
    if config.features is None:
        return
    clusters = TextClusters.load(folder / CLUSTERS_FILE)
    encoder, encoder_tokenizer = _encoder(config.features)
    set_feature_source(model, ClusterSource(clusters, encoder, encoder_tokenizer, tokenizer))


def _encoder(features: FeaturesConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"revision": features.revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(features.encoder, **options)
        return AutoModel.from_pretrained(features.encoder, **options).eval().requires_grad_(False), tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        known = "sentence-transformers/all-MiniLM-L6-v2"
        raise ConfigError(
            f"features.encoder: cannot load {features.encoder!r}: {reason}",
            hint=f"name an encoder of the Hugging Face hub or a local folder, such as {known}.",
        ) from error

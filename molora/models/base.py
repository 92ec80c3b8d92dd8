"""The frozen base of a recipe and its tokenizer: where it is loaded from, its head, its quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from molora.assets import TINY, tiny_path
from molora.config import BaseConfig
from molora.disk.hub import only_cached_if_offline
from molora.errors import ConfigError, MoLoraError
from molora.models.base_check import refuse_encoder
from molora.models.label_match import LabelMatcher, match_labels
from molora.models.new_parts import begin_new_parts
from molora.progress import say

_AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}

Labels = int | Sequence[str] | None
"""What a SEQ_CLS head needs: how many classes, or their texts where the head matches texts."""


def load_base(base: BaseConfig, labels: Labels = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model and its tokenizer, in eval mode, with a pad token.

    Raises ConfigError for no such model, a model of another kind, or an extra that is not installed.
    """
    settings = {"dtype": getattr(torch, base.dtype), **_quantization(base), **_head(base, labels)}
    if "num_labels" in settings:
        settings["ignore_mismatched_sizes"] = True  # the head is trained anew
    say(f"loading {base.model}")
    tokenizer = load_tokenizer(base)
    with _explained(base):
        model, loading = _auto_class(base).from_pretrained(
            **_source(base), **settings, output_loading_info=True
        )
    refuse_encoder(base, model)
    resized = [key for key, *_ in loading["mismatched_keys"]]  # a head of another number of labels, say
    begin_new_parts(model, [*loading["missing_keys"], *resized], base.model)
    if base.head == "match":
        model = match_labels(model.eval(), tokenizer, _texts(labels))
    model.name_or_path = base.model  # what an adapter remembers of its base: not a path of this machine
    model.base_revision = base.revision  # and this
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if base.quantization == "nf4":
        _keep_weights_unpacked(model)
    return model.eval(), tokenizer


def load_tokenizer(base: BaseConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with its eos token for padding where it has no pad token."""
    with _explained(base):
        tokenizer = AutoTokenizer.from_pretrained(**_source(base))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"base.model: the tokenizer of {base.model!r} has no pad token and no eos token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_skeleton(base: BaseConfig, labels: Labels = None) -> PreTrainedModel:
    """The base without its weights, on the meta device."""
    with _explained(base):
        described = AutoConfig.from_pretrained(**_source(base), **_head(base, labels))
    with torch.device("meta"):
        model: PreTrainedModel = _auto_class(base).from_config(described)
        if base.head == "match":
            return LabelMatcher(model, torch.empty(len(_texts(labels)), described.hidden_size))
    return model


def _source(base: BaseConfig) -> dict[str, Any]:
    path = str(tiny_path(str(base.revision))) if base.model == TINY else base.model
    return {"pretrained_model_name_or_path": path, "revision": base.revision, "trust_remote_code": False}


def _auto_class(base: BaseConfig) -> Any:
    return AutoModel if base.head == "match" else _AUTO_CLASSES[base.task_type]


def _head(base: BaseConfig, labels: Labels) -> dict[str, Any]:
    return {"num_labels": labels} if base.task_type == "SEQ_CLS" and isinstance(labels, int) else {}


def _texts(labels: Labels) -> Sequence[str]:
    if labels is None or isinstance(labels, int):
        raise ConfigError("base.head: match needs the texts of the labels.", hint="give every task `labels`.")
    return labels


@contextmanager
def _explained(base: BaseConfig) -> Iterator[None]:
    """Turn what transformers raises for a base it cannot load into a ConfigError."""
    remote = base.model != TINY and not Path(base.model).exists()
    offline: str | None = None
    try:
        with only_cached_if_offline() if remote else nullcontext() as offline:
            yield
    except MoLoraError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if offline is not None:
            reason = f"there is no such folder, and {offline}."
        raise ConfigError(
            f"base.model: cannot load {base.model!r} as {base.task_type}: {reason}",
            hint=f"allowed: {TINY}, a local folder with config.json and safetensors, or a Hugging Face hub id.",
        ) from error


def _quantization(base: BaseConfig) -> dict[str, Any]:
    if base.quantization == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"base.quantization: {base.quantization} needs the package bitsandbytes, which is not installed.",
            hint="install the extra: pip install 'molora[quant]', or set base.quantization: none.",
        )
    if base.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, base.dtype)
    )
    return {"quantization_config": four_bit}


def _keep_weights_unpacked(model: PreTrainedModel) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in place at the first forward without
    # gradients; from then on a training forward gives its input no gradient.
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False

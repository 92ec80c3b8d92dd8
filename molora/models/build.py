"""Build the frozen base, its tokenizer and the mixture on it, from a recipe or from a saved run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
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

from molora.assets import tiny_path
from molora.config import BaseConfig, RunConfig, TrainConfig
from molora.data.tasks import TaskSet, distinct_labels
from molora.disk.card import WEIGHTS_FILE
from molora.errors import AdapterError, ConfigError, MoLoraError
from molora.models.label_match import LabelMatcher, match_labels
from molora.store.adapter import load, read_config
from molora.store.compose import compose
from molora.store.runs import Run
from molora.training.features import load_features
from molora.tuner.config import MoLoraConfig

TINY = "molora/tiny"

_AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


Labels = int | Sequence[str] | None
"""What a SEQ_CLS head needs: how many classes, or their texts where the head matches texts."""


def load_base(base: BaseConfig, labels: Labels = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model and its tokenizer, in eval mode, with a pad token.

    Args:
        base: the recipe's `base` section.
        labels: classes of a SEQ_CLS head, or with `head: match` their texts.

    Raises:
        ConfigError: no such model, a model of another kind, or an extra that is not installed.
    """
    settings = {"dtype": getattr(torch, base.dtype), **_quantization(base), **_head(base, labels)}
    if "num_labels" in settings:
        settings["ignore_mismatched_sizes"] = True  # the head is trained anew
    tokenizer = load_tokenizer(base)
    with _explained(base):
        model = _auto_class(base).from_pretrained(_source(base), **_options(base), **settings)
    if base.head == "match":
        model = match_labels(model.eval(), tokenizer, _texts(labels))
    model.name_or_path = base.model  # what an adapter remembers of its base: not a path of this machine
    _set_pad_token(model, tokenizer)
    if base.quantization == "nf4":
        _keep_weights_unpacked(model)
    return model.eval(), tokenizer


def load_tokenizer(base: BaseConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with its eos token for padding where it has no pad token."""
    with _explained(base):
        tokenizer = AutoTokenizer.from_pretrained(_source(base), **_options(base))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"base.model: the tokenizer of {base.model!r} has no pad token and no eos token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_skeleton(config: RunConfig, task_ids: dict[str, int], labels: Labels = None) -> PeftModel:
    """The model of a recipe without its weights: enough to check targets and count parameters."""
    with _explained(config.base):
        described = AutoConfig.from_pretrained(
            _source(config.base), **_options(config.base), **_head(config.base, labels)
        )
    with torch.device("meta"):
        base = _auto_class(config.base).from_config(described)
        if config.base.head == "match":
            base = LabelMatcher(base, torch.empty(len(_texts(labels)), described.hidden_size))
        return _mixture(base, config, task_ids)


def _source(base: BaseConfig) -> str:
    return str(tiny_path()) if base.model == TINY else base.model


def _options(base: BaseConfig) -> dict[str, Any]:
    return {"revision": base.revision, "trust_remote_code": False}


def _auto_class(base: BaseConfig) -> Any:
    return AutoModel if base.head == "match" else _AUTO_CLASSES[base.task_type]


def _head(base: BaseConfig, labels: Labels) -> dict[str, Any]:
    return {"num_labels": labels} if base.task_type == "SEQ_CLS" and isinstance(labels, int) else {}


def _texts(labels: Labels) -> Sequence[str]:
    if labels is None or isinstance(labels, int):
        raise ConfigError("base.head: match needs the texts of the labels.", hint="give every task `labels`.")
    return labels


def labels_of_tasks(base: BaseConfig, tasks: TaskSet) -> Labels:
    """What the head of this base needs to know of these tasks."""
    return tasks.label_texts if base.head == "match" else (tasks.num_labels or None)


def tasks_of(config: RunConfig, known_ids: Mapping[str, int] | None = None) -> TaskSet:
    """A recipe's tasks, over one head for all labels where the base has such a head."""
    tasks = TaskSet.from_config(config.data, known_ids=known_ids, task_type=config.base.task_type)
    return tasks.joined() if config.base.head == "match" else tasks


@contextmanager
def _explained(base: BaseConfig) -> Iterator[None]:
    """Turn what transformers raises for a base it cannot load into a ConfigError."""
    try:
        yield
    except MoLoraError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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


def _set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def adapter_config(config: RunConfig, task_ids: dict[str, int]) -> MoLoraConfig:
    """The PEFT config of a recipe's `adapter` section for these tasks."""
    settings = config.adapter.model_dump(exclude_none=True, exclude={"tasks"})
    settings.pop("from_loras", None)
    return MoLoraConfig(**settings, **_tasks(config, task_ids))


def _tasks(config: RunConfig, task_ids: dict[str, int]) -> dict[str, Any]:
    tasks: Any = config.adapter.tasks
    return {
        "tasks": tasks if tasks is not None else list(task_ids),
        "task_ids": dict(task_ids),
        "task_type": config.base.task_type,
    }


def _mixture(base: PreTrainedModel, config: RunConfig, task_ids: dict[str, int]) -> PeftModel:
    """A new adapter on the base: of fresh experts, or of the LoRAs the recipe names."""
    loras = config.adapter.from_loras
    if loras is None:
        return get_peft_model(base, adapter_config(config, task_ids))
    kept = ("gate", "combine", "always_on", "aux_losses", "lora_dropout", "modules_to_save")
    settings = config.adapter.model_dump(include=set(kept), exclude_none=True)
    return compose(base, loras, **settings, **_tasks(config, task_ids))


def build_model(
    config: RunConfig, task_ids: dict[str, int], labels: Labels = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A new mixture on the recipe's base, ready to train.

    Args:
        config: the recipe.
        task_ids: ids of its tasks by name.
        labels: see `labels_of_tasks`.
    """
    base, tokenizer = load_base(config.base, labels)
    ready_to_train(base, config.train)
    return _mixture(base, config, task_ids), tokenizer


def ready_to_train(base: Any, train: TrainConfig) -> None:
    """No key-value cache in training forwards, which would only pay for it; checkpointing where the recipe wants it."""
    if getattr(base.config, "use_cache", False):
        base.config.use_cache = False  # generate() asks for the cache itself
    if train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_trained(
    path: str | Path, *, trainable: bool = False, device: str | torch.device | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase, RunConfig | None]:
    """The model of a run folder or an adapter folder, verified, in eval mode.

    It is on `device`: a CUDA device where there is one, unless told otherwise. Returns the recipe too where
    the folder is a run, else None.

    Raises:
        AdapterError: damaged or incomplete folder, or another base.
        ConfigError: neither a run nor an adapter folder.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        folder, config = path, None
        base_config, labels = _base_of_adapter(path)
    else:
        run = Run.find(path)
        folder, config = run.trained_adapter, run.config
        base_config, labels = config.base, labels_of(config)
    base, tokenizer = load_base(base_config, labels)
    model = load(base, folder, is_trainable=trainable)
    if config is not None:
        load_features(config, run.path, model, tokenizer)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer, config


def labels_of(config: RunConfig) -> Labels:
    """What the head of this (resolved) recipe needs: texts of all labels, or the size of the largest label set."""
    if config.base.head == "match":
        return distinct_labels(task.labels or () for task in config.data.tasks.values())
    sizes = [len(task.labels) for task in config.data.tasks.values() if task.labels]
    return max(sizes) if config.base.task_type == "SEQ_CLS" and sizes else None


def _base_of_adapter(folder: Path) -> tuple[BaseConfig, Labels]:
    stored = read_config(folder)
    if not stored.base_model_name_or_path:
        raise AdapterError(
            f"{folder / 'adapter_config.json'} does not say which base model the adapter belongs to.",
            hint="load the base yourself and call molora.load(base, folder).",
        )
    if (stored.base_fingerprint or {}).get("architecture") == LabelMatcher.__name__:
        raise AdapterError(
            f"{folder} belongs to a base with `head: match`, whose labels only the recipe of its run knows.",
            hint="give the run's folder instead, the one with config.yaml.",
        )
    task_type = str(stored.task_type or "CAUSAL_LM")
    base = BaseConfig.model_validate({"model": stored.base_model_name_or_path, "task_type": task_type})
    return base, _head_rows(folder) if task_type == "SEQ_CLS" else None


def _head_rows(folder: Path) -> int | None:
    """Rows of a saved classification head: its last layer is the one with the fewest."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as tensors:
        heads = [name for name in tensors.keys() if "molora_" not in name]  # noqa: SIM118 (not a mapping)
        return min((tensors.get_slice(name).get_shape()[0] for name in heads), default=None)

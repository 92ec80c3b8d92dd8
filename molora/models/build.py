"""The mixture on its base, from a recipe or from a saved run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora.config import BaseConfig, RunConfig, TrainConfig
from molora.data.clusters import need_kmeans
from molora.data.tasks import TaskSet, assign_ids, distinct_labels
from molora.disk.adapter_files import check_files
from molora.disk.card import WEIGHTS_FILE
from molora.errors import AdapterError, ConfigError
from molora.models.base import Labels, base_skeleton, load_base
from molora.models.features import load_features
from molora.models.label_match import LabelMatcher
from molora.models.new_parts import saved_with
from molora.store.adapter import load, read_config
from molora.store.checkpoints import checkpoint_of, put_weights
from molora.store.compose import compose
from molora.store.runs import Run
from molora.tuner.config import MoLoraConfig


def build_skeleton(config: RunConfig, task_ids: dict[str, int], labels: Labels = None) -> PeftModel:
    """The model of a recipe without its weights: enough to check targets and count parameters."""
    base = base_skeleton(config.base, labels)
    with torch.device("meta"):
        return _mixture(base, config, task_ids)


def labels_of_tasks(base: BaseConfig, tasks: TaskSet) -> Labels:
    """What the head of this base needs to know of these tasks."""
    return tasks.label_texts if base.head == "match" else (tasks.num_labels or None)


def tasks_of(config: RunConfig, known_ids: Mapping[str, int] | None = None) -> TaskSet:
    """A recipe's tasks, over one head for all labels where the base has such a head."""
    tasks = TaskSet.from_config(config.data, known_ids=known_ids, task_type=config.base.task_type)
    return tasks.joined() if config.base.head == "match" else tasks


def adapter_config(config: RunConfig, task_ids: dict[str, int]) -> MoLoraConfig:
    """The PEFT config of a recipe's `adapter` section for these tasks."""
    settings = config.adapter.model_dump(exclude_none=True, exclude={"tasks", "from_loras"})
    return MoLoraConfig(**settings, **_tasks(config, task_ids))


def _tasks(config: RunConfig, task_ids: dict[str, int]) -> dict[str, Any]:
    tasks: Any = config.adapter.tasks
    return {
        "tasks": tasks if tasks is not None else list(task_ids),
        "task_ids": dict(task_ids),
        "task_type": config.base.task_type,
    }


def check_router(config: RunConfig) -> None:
    """Raise ConfigError where the recipe's router could not learn: that comes at the end of training."""
    router = config.adapter.router
    if router is not None and router.kind == "prototypes":
        need_kmeans("adapter.router: prototypes")


def _mixture(base: PreTrainedModel, config: RunConfig, task_ids: dict[str, int]) -> PeftModel:
    """A new adapter on the base: of fresh experts, or of the LoRAs the recipe names."""
    check_router(config)
    loras = config.adapter.from_loras
    whole = saved_with(base, config.adapter.modules_to_save)
    if loras is None:
        fresh = adapter_config(config, task_ids)
        fresh.modules_to_save = whole
        return get_peft_model(base, fresh)
    kept = {"gate", "router", "combine", "always_on", "aux_losses", "lora_dropout"}
    settings = config.adapter.model_dump(include=kept, exclude_none=True)
    settings |= {} if whole is None else {"modules_to_save": whole}
    return compose(base, loras, **settings, **_tasks(config, task_ids))


def build_model(
    config: RunConfig, task_ids: dict[str, int], labels: Labels = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A new mixture on the recipe's base, ready to train; for `labels` see `labels_of_tasks`."""
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
    path: str | Path,
    *,
    trainable: bool = False,
    device: str | torch.device | None = None,
    allow_other_base: bool = False,
    checkpoint: int | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase, RunConfig | None]:
    """The model of a run folder or an adapter folder, verified, in eval mode, its tokenizer, and a run's recipe.

    It is on `device`: a CUDA device where there is one, unless told otherwise. With
    `allow_other_base` the base may have other weights than the one it was trained on. `checkpoint`: as the run was after
    that step, which needs no adapter yet. Raises AdapterError for a damaged or incomplete folder, no such checkpoint, or
    another base; ConfigError for neither a run nor an adapter folder.
    """
    path = Path(path)
    config = None
    if (path / "adapter_config.json").is_file():
        if checkpoint is not None:
            raise ConfigError(f"{path} is an adapter folder, which has no checkpoints.", hint="give a run.")
        base, tokenizer = load_base(*_base_of_adapter(path))
        model = load(base, path, is_trainable=trainable, allow_other_base=allow_other_base)
    else:
        run = Run.find(path)
        config = run.config
        at = None if checkpoint is None else checkpoint_of(run, checkpoint)
        if at is not None and not run.adapter.is_dir():  # its training has not come to an end
            model, tokenizer = build_model(config, assign_ids([*config.data.tasks], {}), labels_of(config))
            model.eval()
        else:
            base, tokenizer = load_base(config.base, labels_of(config))
            model = load(base, run.trained_adapter, is_trainable=trainable, allow_other_base=allow_other_base)
        if at is not None:
            put_weights(model, at)
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
    given = {"model": stored.base_model_name_or_path, "task_type": task_type, "revision": stored.revision}
    return BaseConfig.model_validate(given), _head_rows(folder) if task_type == "SEQ_CLS" else None


def _head_rows(folder: Path) -> int | None:
    """Rows of a saved classification head: its last layer is the one with the fewest."""
    check_files(folder)
    with safe_open(folder / WEIGHTS_FILE, "pt") as tensors:
        heads = [name for name in tensors.keys() if "molora_" not in name]  # noqa: SIM118 (not a mapping)
        return min((tensors.get_slice(name).get_shape()[0] for name in heads), default=None)

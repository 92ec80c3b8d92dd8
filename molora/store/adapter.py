"""Save an adapter atomically; load one after checking every byte, tensor and the base it belongs to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from molora.config.suggest import did_you_mean
from molora.disk.adapter_files import check_files
from molora.disk.atomic import recover, write_folder
from molora.disk.base_check import check_base
from molora.disk.card import CONFIG_FILE, WEIGHTS_FILE, write_card
from molora.disk.manifest import read_json
from molora.errors import AdapterError, ConfigError
from molora.tuner.adapter_name import check_adapter_name
from molora.tuner.config import MoLoraConfig


def save(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write one adapter of what `get_peft_model` or `load` returned as a folder; of several active ones, say which.

    The folder is new, empty, or one that molora wrote and nothing was added to; such a one is replaced atomically or
    stays as it was. Raises ConfigError for a model without molora, or a folder that cannot be written or may not be
    replaced; AdapterError where the disk is full.
    """
    model = peft_model(model)
    name = active_adapter(model, adapter_name)
    check_adapter_name(name)
    config = model.peft_config[name]
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [tensor for key, tensor in named if f".{name}." in f"{key}."]
    with write_folder(path, size=sum(tensor.nbytes for tensor in tensors)) as folder:
        # "auto" would ask the Hub whether the vocabulary was resized; experts never touch embeddings.
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        if name != "default":
            for file in list((folder / name).iterdir()):
                file.replace(folder / file.name)
            (folder / name).rmdir()
        write_card(config, folder)
    return Path(path)


def load(
    base: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_other_base: bool = False,
) -> PeftModel:
    """Put a saved adapter on its base, in eval mode.

    Checked first: the manifest (sha256 of every file) where there is one, the config's keys, the base's
    fingerprint; then the tensors' keys, shapes, dtypes, finiteness and digest. Nothing is unpickled.

    Args:
        base: the transformers model the adapter was trained on; it is changed in place, as in PEFT.
        is_trainable: keep trainable experts trainable (frozen ones stay frozen).
        allow_other_base: load even if the base has other weights; shapes must still fit.

    Raises:
        AdapterError: a damaged or incomplete folder, or another base.
        ConfigError: a base that has adapters already, or a bad adapter name.
    """
    check_adapter_name(adapter_name)
    if isinstance(base, PeftModel):
        raise ConfigError(
            "the base has adapters already.", hint="use model.load_adapter(path, adapter_name) for one more."
        )
    folder = recover(path)
    config = read_config(folder)
    if allow_other_base:
        config.base_fingerprint = None
    check_base(config.base_fingerprint, base)  # before the base is touched
    with _explain(folder, config):
        return PeftModel.from_pretrained(
            base, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config
        )


def read_config(path: str | os.PathLike[str]) -> MoLoraConfig:
    """The config of an adapter folder, its files verified.

    Raises AdapterError for no adapter folder, a damaged one, or a config this version cannot read.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        what = "has no adapter_config.json" if folder.is_dir() else "does not exist"
        raise AdapterError(f"{folder} {what}.", hint="give a folder that molora or PEFT saved an adapter in.")
    check_files(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{folder / WEIGHTS_FILE} is missing.")
    stored = read_json(folder / CONFIG_FILE)
    kind = stored.get("peft_type") if isinstance(stored, dict) else type(stored).__name__
    if not isinstance(stored, dict) or kind != "MOLORA":
        hint = "use molora.import_lora to bring an ordinary LoRA in as an expert."
        raise AdapterError(
            f"{folder / CONFIG_FILE} describes a {kind!r} adapter, not a mixture of experts.",
            hint=hint if kind == "LORA" else None,
        )
    known = [field.name for field in fields(MoLoraConfig)]
    for key in stored:
        if key not in known:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {key!r} is not a setting.{did_you_mean(key, known)}",
                hint="the file was edited by hand, or written by a newer molora.",
            )
    try:
        return MoLoraConfig(**stored)
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error


def active_adapter(model: PeftModel, adapter_name: str | None) -> str:
    """The adapter of that name, or the only active one."""
    if adapter_name is not None:
        if adapter_name not in model.peft_config:
            raise ConfigError(f"no adapter {adapter_name!r}; adapters: {', '.join(model.peft_config)}.")
        return adapter_name
    if len(model.active_adapters) != 1:
        raise ConfigError(f"{len(model.active_adapters)} adapters are active; name one with adapter_name=.")
    return str(model.active_adapters[0])


def peft_model(model: nn.Module) -> PeftModel:
    """The PeftModel itself, below torch.compile; ConfigError where it has no molora adapter."""
    model = getattr(model, "_orig_mod", model)  # torch.compile
    if not isinstance(model, PeftModel) or not any(
        isinstance(config, MoLoraConfig) for config in model.peft_config.values()
    ):
        raise ConfigError(
            f"{type(model).__name__} is not a molora model.",
            hint="build one with peft.get_peft_model(base, MoLoraConfig(...)).",
        )
    return model


@contextmanager
def _explain(folder: Path, config: MoLoraConfig) -> Iterator[None]:
    """PEFT's and safetensors' own errors as AdapterErrors that name the file."""
    file = folder / WEIGHTS_FILE
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged: {error}.", hint="copy it again.") from error
    except KeyError as error:
        # PEFT looks up every tensor of a head (a module saved whole) by its name in the model.
        if not any(f".{head}." in str(error) for head in config.modules_to_save or ()):
            raise
        raise AdapterError(f"{file} lacks the tensor {error}.", hint="copy it again.") from error

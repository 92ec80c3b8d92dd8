"""Reads an ordinary LoRA folder; every feature beyond plain LoRA is refused by name."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from molora.disk.card import CONFIG_FILE, WEIGHTS_FILE
from molora.disk.fingerprint import base_modules
from molora.disk.manifest import MANIFEST, read_json, verify_folder
from molora.errors import AdapterError
from molora.tuner.config import ExpertSpec
from molora.tuner.targets import pattern_value

PREFIX = "base_model.model."
_MAGNITUDE = re.compile(r"(?P<key>.+)\.lora_magnitude_vector(\.weight)?")
_FACTOR = re.compile(r"(?P<key>.+)\.lora_(?P<factor>[AB])\.weight")
_HEADS = ("classifier", "score")  # PEFT saves these of every classifier, listed or not

_READ = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Settings that are either used here or only matter while a LoRA is trained."""

_REFUSED = {
    "use_dora": "DoRA rescales the whole weight, which only experts of kind dora do",
    "lora_bias": "a LoRA with biases has no place for them in an expert",
    "target_parameters": "it adapts bare parameters, not linear layers",
    "trainable_token_indices": "it trains embedding rows, which are not part of an expert",
    "layer_replication": "it changes the number of layers of the base",
    "alora_invocation_tokens": "an activated LoRA depends on the position of its invocation tokens",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA's factors by module name, `A` (rank, d_in) and `B` (d_out, rank), and its scaling rule."""

    path: Path
    spec: ExpertSpec
    factors: dict[str, tuple[Tensor, Tensor]]
    magnitudes: dict[str, Tensor]  # (d_out,) of each module, where it is a DoRA
    heads: dict[str, Tensor]  # tensors of modules_to_save
    config: dict[str, Any]  # its adapter_config.json

    @property
    def task_type(self) -> str | None:
        """CAUSAL_LM, SEQ_CLS, ..., where its config says."""
        return self.config.get("task_type")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of what an expert has no place for."""
        return tuple(sorted(self.heads))

    def rank(self, key: str) -> int:
        """The rank its config gives a module."""
        return int(pattern_value(self.spec.rank_pattern, key, self.spec.r))

    def scaling(self, key: str) -> float:
        """The factor its config gives a module's B A."""
        alpha, r = float(pattern_value(self.spec.alpha_pattern, key, self.spec.lora_alpha)), self.rank(key)
        return alpha / math.sqrt(r) if self.spec.use_rslora else alpha / r


def read_lora(path: str | os.PathLike[str], *, dora: bool = False) -> LoraFolder:
    """Read a PEFT LoRA folder (safetensors only), with `dora` also one that has magnitudes.

    Raises AdapterError, with the reason, for a damaged folder, another kind of adapter, or a LoRA variant.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    config = read_json(folder / CONFIG_FILE)
    _check_config(folder, config, dora)
    factors, magnitudes, heads = _tensors(folder, config)
    spec = ExpertSpec(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )
    return LoraFolder(folder, spec, factors, magnitudes, heads, config)


def short_names(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Targets for these modules of a base: last names if they match exactly these modules, else full names."""
    keys = set(keys)
    last = {key.rpartition(".")[2] for key in keys}
    meant = {name for name, _ in base_modules(model) if name.rpartition(".")[2] in last}
    return sorted(last if meant == keys else keys)


def _check_config(folder: Path, config: object, dora: bool) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{folder} holds a {kind!r} adapter; only an ordinary LoRA can become an expert.")
    set_here = [name for name in _REFUSED if config.get(name) and not (dora and name == "use_dora")]
    reasons = [f"{name}: {_REFUSED[name]}" for name in set_here]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r}: it trained biases of the base, which experts leave alone")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING):
        reasons.append(f"init_lora_weights={init!r}: it belongs to a base whose weights that method changed")
    unknown = [name for name, value in config.items() if value and name not in _READ and name not in _REFUSED]
    reasons += [f"{name}={config[name]!r}: not a setting of an ordinary LoRA" for name in unknown]
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or config[name] <= 0:
            reasons.append(f"{name}={config.get(name)!r}: expected a positive number")
    if reasons:
        raise AdapterError(f"{folder} cannot become an expert:\n  " + "\n  ".join(reasons))


def _tensors(
    folder: Path, config: dict[str, Any]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Pairs of factors and magnitudes by module, and the tensors that belong to modules saved whole."""
    file = folder / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        hint = "only safetensors are read: a pickle (.bin) could run any code."
        raise AdapterError(f"{file} is missing.", hint=hint) from None
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged: {error}.", hint="copy it again.") from error
    saved = set(config.get("modules_to_save") or ())
    if config.get("task_type") == "SEQ_CLS":
        saved.update(_HEADS)
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(bare)
        if match:
            halves.setdefault(match["key"], {})[match["factor"]] = tensor
        elif config.get("use_dora") and (match := _MAGNITUDE.fullmatch(bare)):
            magnitudes[match["key"]] = tensor
        elif set(bare.split(".")) & saved:
            heads[bare] = tensor
        else:
            problems.append(f"{name}: not a factor of an ordinary LoRA")
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            problems.append(f"{name}: holds values that are not finite numbers")
    problems += _unfit(halves, magnitudes if config.get("use_dora") else None)
    if problems or not halves:
        listed = problems[:10] or ["it holds no factors at all"]
        raise AdapterError(f"{file} cannot become an expert:\n  " + "\n  ".join(listed))
    return {key: (half["A"], half["B"]) for key, half in halves.items()}, magnitudes, heads


def _unfit(
    halves: Mapping[str, Mapping[str, Tensor]], magnitudes: Mapping[str, Tensor] | None
) -> Iterator[str]:
    """What is wrong with modules' factors, and their magnitudes where there are to be some."""
    for key, half in halves.items():
        if set(half) != {"A", "B"}:
            yield f"{key}: has lora_{next(iter(half))} only"
        elif half["A"].dim() != 2 or half["B"].dim() != 2 or half["A"].shape[0] != half["B"].shape[1]:
            a, b = tuple(half["A"].shape), tuple(half["B"].shape)
            yield f"{key}: lora_A {a} and lora_B {b} do not fit"
        elif magnitudes is not None and getattr(magnitudes.get(key), "shape", None) != half["B"].shape[:1]:
            yield f"{key}: has no magnitude for each of its {len(half['B'])} outputs"

"""The fused LoRA's folder: what it must fit, which heads go along, its config, card and record of how it was made."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.config.suggest import options
from molora.disk.atomic import write_file, write_folder, write_json
from molora.disk.card import WEIGHTS_FILE
from molora.disk.fingerprint import base_modules
from molora.errors import AdapterError, ConfigError
from molora.experts.products import Cut, Product
from molora.fusion.sources import Source
from molora.store.export_check import check_loadable
from molora.store.lineage import FUSION_FILE
from molora.store.lora_folder import PREFIX, short_names


@dataclass(frozen=True)
class Fused:
    """The result of a fusion: its folder, layers, ranks (smallest, largest), and the share of its norm a cut took."""

    path: Path
    layers: int
    ranks: tuple[int, int]
    lost: float


def check_fits(base: nn.Module, sources: Sequence[Source]) -> None:
    """AdapterError where the base lacks a layer, or has one of another shape."""
    shapes = {name: _shape(module) for name, module in base_modules(base)}
    for source in sources:
        for key, (A, B) in source.lora.factors.items():
            found = shapes.get(key)
            if key not in shapes or (found is not None and found != (B.shape[0], A.shape[1])):
                what = "has no such layer" if key not in shapes else f"maps {found[1]} to {found[0]} there"  # type: ignore[index]
                raise AdapterError(
                    f"{source.name} does not fit this base: {key} maps {A.shape[1]} to {B.shape[0]}, the base {what}.",
                    hint="use the base the LoRA was trained on.",
                )


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear, None where it does not say."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    found = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return None if None in found else found  # type: ignore[return-value]


def chosen_heads(sources: Sequence[Source], chosen: str | None) -> dict[str, Tensor]:
    """Tensors of modules saved whole: of the source named, or of all where they are equal."""
    having = {source.name: source.lora.heads for source in sources if source.lora.heads}
    if chosen is not None:
        if chosen not in having:
            raise ConfigError(f"heads is {chosen!r}.{options(chosen, list(having), 'Sources with heads')}")
        return having[chosen]
    first = next(iter(having.values()), {})
    for heads in having.values():
        if heads.keys() != first.keys() or not all(torch.equal(heads[key], first[key]) for key in heads):
            raise AdapterError(
                f"{', '.join(having)} have different trained heads ({', '.join(sorted(first))}), and heads are not fused.",
                hint="name the source whose heads go along: heads=NAME, or --heads NAME.",
            )
    return first


def write_lora(
    out: Path,
    base: nn.Module | None,
    sources: Sequence[Source],
    cuts: Mapping[str, Cut],
    heads: Mapping[str, Tensor],
    made: Mapping[str, Any],
) -> Fused:
    """Write the folder; `made` says how, for `fusion.json` and the card."""
    parts = {key: cut.product for key, cut in cuts.items()}
    tensors = dict(heads)
    for key, part in parts.items():
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = part.A.float(), part.B.float()
    own = {f"{PREFIX}{name}": tensor.clone().contiguous() for name, tensor in tensors.items()}
    lora = _config(base, sources, parts)
    if base is not None:
        check_loadable(lora, base, own)
    ranks = [part.rank for part in parts.values()]
    lost = math.sqrt(sum(cut.lost for cut in cuts.values()) / sum(cut.whole for cut in cuts.values()))
    facts = {"format": 1, **made, "layers": len(parts), "ranks": [min(ranks), max(ranks)], "lost": lost}
    with write_folder(out, size=sum(t.nbytes for t in own.values())) as folder:
        save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        lora.save_pretrained(str(folder))
        write_json(folder / FUSION_FILE, facts)
        write_file(folder / "README.md", _card(lora, made).encode())
    return Fused(out, len(parts), (min(ranks), max(ranks)), lost)


def _config(base: nn.Module | None, sources: Sequence[Source], parts: Mapping[str, Product]) -> LoraConfig:
    """Alpha is the rank of each layer, so that every scaling is 1."""
    configs = [source.lora.config for source in sources]
    r = Counter(part.rank for part in parts.values()).most_common(1)[0][0]
    others = {key: part.rank for key, part in parts.items() if part.rank != r}
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or ()})

    def common(key: str) -> Any:
        values = [config.get(key) for config in configs if config.get(key) is not None]
        return values[0] if values and all(value == values[0] for value in values) else None

    flipped = any(config.get("fan_in_fan_out") for config in configs)
    if base is not None:
        modules = dict(base_modules(base))
        flipped = any(isinstance(modules[key], Conv1D) for key in parts)
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(parts) if base is None else short_names(base, parts),
        modules_to_save=saved or None,
        fan_in_fan_out=flipped,
        task_type=common("task_type"),
        base_model_name_or_path=common("base_model_name_or_path"),
        revision=common("revision"),
        inference_mode=True,
    )


def _card(lora: LoraConfig, made: Mapping[str, Any]) -> str:
    name = lora.base_model_name_or_path
    named = f"base_model: {name}\n" if name and not os.path.isabs(name) else ""
    rows = "".join(
        f"| {source['name']} | {source.get('part', 'LoRA')} | {source['weight']:.6g} |\n"
        for source in made["sources"]
    )
    return (
        f"---\nlibrary_name: peft\n{named}tags:\n- lora\n---\n\n"
        f"# LoRA fused of {len(made['sources'])} by `{made['method']}`\n\n"
        f"| source | part | weight |\n| --- | --- | --- |\n{rows}\n"
        "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, folder)\n```\n"
    )

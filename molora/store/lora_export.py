"""Write an expert, a task's experts or a fixed mixture as one ordinary PEFT LoRA, exactly."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from molora.config.choices import KINDS
from molora.disk.atomic import check_target, write_file, write_folder
from molora.disk.card import WEIGHTS_FILE
from molora.disk.tensors import check_finite
from molora.errors import ConfigError
from molora.experts.bank import Expert
from molora.experts.factor_mix import as_one
from molora.forward.mount import PLAIN, Mount
from molora.store.adapter import active_adapter, peft_model
from molora.store.export_check import check_loadable
from molora.store.lora_folder import PREFIX, short_names
from molora.tuner.base_weight import BaseWeight
from molora.tuner.config import MoLoraConfig
from molora.tuner.layer import MoLoraLayer
from molora.tuner.merge import static_shares, static_weights
from molora.tuner.placement import experts_at
from molora.tuner.targets import pattern_value


@dataclass(frozen=True)
class _Part:
    """One module of the LoRA: `A` (rank, d_in), `B` (d_out, rank), its scaling and the alpha behind it."""

    A: Tensor
    B: Tensor
    scaling: float
    alpha: float
    root: bool = False  # scaling = alpha/√rank instead of alpha/rank
    magnitude: Tensor | None = None  # (d_out,) where it is a DoRA

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def with_rule(self, root: bool) -> _Part:
        """The same scaling, expressed by the other rule's alpha."""
        if root == self.root:
            return self
        return replace(self, root=root, alpha=self.scaling * (math.sqrt(self.rank) if root else self.rank))

    def folded(self, rank: int) -> _Part:
        """Scaling 1 (alpha = rank), the scaling multiplied into B, padded with zeros to `rank`."""
        pad = rank - self.rank
        A, B = F.pad(self.A, (0, 0, 0, pad)), F.pad(self.B * self.scaling, (0, pad))
        return _Part(A, B, 1.0, rank, magnitude=self.magnitude)


def export_lora(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    expert: str | None = None,
    task: str | None = None,
    weights: Mapping[str, float] | None = None,
    adapter_name: str | None = None,
    fold_scaling: bool = False,
) -> Path:
    """Write a folder that stock PEFT loads with `PeftModel.from_pretrained`, without molora.

    One expert keeps its factors, rank, alpha and scaling rule. Several are one LoRA of the sum of their
    ranks, the weights multiplied into B: exact, not an average. Experts of kind dora become a LoRA with
    `use_dora`, a mixture of them too. Plain LoRAs (`plain_targets`) and heads
    (`modules_to_save`) are included. Modules whose update is zero are left out.

    Args:
        out: the folder to write: new, empty, or one that molora wrote, which is replaced atomically.
        expert: this expert alone, at weight 1.
        task: the experts of this task, where a task's weights do not depend on the input.
        weights: a fixed mixture by expert name; others get 0. With none of the three: the mixture itself
            where its gate reads no input.
        fold_scaling: multiply the scaling into B and pad to one rank, so that `lora_alpha = r` without
            rsLoRA or patterns: for engines that read only `r` and `lora_alpha`.

    Raises:
        ConfigError: unknown names, more than one of expert, task and weights, or weights that depend on the input, or
            virtual tokens;
            `out` may not be replaced.
    """
    check_target(out)
    if sum(choice is not None for choice in (expert, task, weights)) > 1:
        raise ConfigError("give one of expert=, task= and weights=.")
    wrapped = peft_model(model)
    adapter = active_adapter(wrapped, adapter_name)
    chosen = {expert: 1.0} if expert is not None else weights
    layers = [m for m in wrapped.modules() if isinstance(m, MoLoraLayer) and adapter in m.mounts]
    config: Any = wrapped.peft_config[adapter]
    with torch.no_grad():
        at = [(layer, layer.mounts[adapter]) for layer in layers]
        parts = {mount.key: _part(config, layer, mount, task, chosen) for layer, mount in at}
        parts = {
            key: part for key, part in parts.items() if part.B.any() or part.magnitude is not None
        } or parts
        # A head that wraps the encoder is molora's own: the LoRA belongs to the encoder.
        wrapper = getattr(wrapped.get_base_model(), "wraps", None)
        targets = [name.removeprefix(f"{wrapper}.") for name in short_names(wrapped, parts)]
        if wrapper is not None:
            parts = {key.removeprefix(f"{wrapper}."): part for key, part in parts.items()}
        if chosen is not None and not any(chosen.values()):
            raise ConfigError("every expert has weight 0; nothing to export.")
        if fold_scaling:
            rank = max(part.rank for part in parts.values())
            parts = {key: part.folded(rank) for key, part in parts.items()}
    conv1d = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers)
    lora = _lora_config(config, parts, targets, conv1d)
    if wrapper is not None:
        lora.task_type = "FEATURE_EXTRACTION"
    named = (f"{kind} `{name}`" for kind, name in (("expert", expert), ("task", task)) if name is not None)
    what = next(named, "a fixed mixture")
    tensors = _heads(wrapped, adapter)
    for key, part in parts.items():
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = part.A, part.B
        if part.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = part.magnitude
    # Views share storage with their stack, which safetensors refuses to write.
    own = {f"{PREFIX}{name}": t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    check_finite(own)
    check_loadable(lora, wrapped.get_base_model(), own)
    with write_folder(out, size=sum(t.nbytes for t in own.values())) as folder:
        save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        lora.save_pretrained(str(folder))
        write_file(folder / "README.md", _card(lora, what, wrapped.get_base_model()).encode())
    return Path(out)


def _part(
    config: MoLoraConfig,
    layer: MoLoraLayer,
    mount: Mount,
    task: str | None,
    chosen: Mapping[str, float] | None,
) -> _Part:
    """What one module contributes; beside experts that scale the output, everything is a DoRA."""
    weights = static_weights(mount, task, chosen)
    part = _low_rank(config, mount, task, weights)
    if not KINDS[config.kind].scales_output:
        return part
    deviation = mount.bank.deviation(weights[0])
    if deviation is None:  # an ordinary LoRA beside them
        deviation = part.B.new_zeros(len(part.B))
    return _as_dora(
        part, 1 + deviation.to(part.B), BaseWeight(layer.get_base_layer(), mount.key, config.kind)
    )


def _as_dora(part: _Part, scale: Tensor, base: BaseWeight) -> _Part:
    """`scale ∘ W + s B A` as DoRA writes it, `m ∘ (W + s B' A) / ‖W + s B' A‖` with `B' = B / scale`."""
    if not scale.all():
        raise ConfigError(
            "this mixture takes an output of the base away entirely, which no DoRA does; merge it instead."
        )
    B = part.B / scale.unsqueeze(1)
    weight = base.weight().to(B)
    return replace(part, B=B, magnitude=scale * (weight + part.scaling * B @ part.A).norm(dim=1))


def _low_rank(config: MoLoraConfig, mount: Mount, task: str | None, weights: Tensor) -> _Part:
    """The factors of one module: a single expert's as they are, several concatenated along the rank."""
    bank = mount.bank
    names = [PLAIN] if mount.plain else experts_at(config, mount.key)
    experts = bank.at_task(static_shares(mount, task))
    if mount.factors and (weights != 0).any() and sorted(weights.flatten().tolist())[-2:] != [0.0, 1.0]:
        mixed = as_one(bank, weights)
        return _Part(mixed.A, mixed.B, 1.0, mixed.rank)
    used = [entry for entry in zip(names, weights[0].tolist(), experts, strict=True) if entry[1]]
    if not used:  # an expert that is not in this layer
        like = bank.expert(0)
        return _Part(like.A[:1] * 0, like.B[:, :1] * 0, 1.0, 1)
    name, weight, expert = used[0]
    if len(used) == 1 and weight == 1.0:
        return _single(config, name, mount.key, expert)
    A = torch.cat([e.A for _, _, e in used])
    B = torch.cat([w * e.scaling * e.B for _, w, e in used], dim=1)
    return _Part(A, B, 1.0, A.shape[0])


def _single(config: MoLoraConfig, name: str, key: str, expert: Expert) -> _Part:
    """One expert with the alpha it was configured with, so that a round trip gives the same numbers."""
    spec: Any = config.expert_specs.get(name, config)
    root = spec.use_rslora or spec.scaling == "alpha_over_sqrt_r"
    if spec.scaling is None or str(spec.scaling).startswith("alpha_over"):
        alpha = pattern_value(spec.alpha_pattern, key, spec.lora_alpha)
        return _Part(expert.A, expert.B, expert.scaling, alpha, root)
    return _Part(expert.A, expert.B, expert.scaling, expert.scaling * expert.rank)


def _lora_config(
    config: MoLoraConfig, parts: dict[str, _Part], targets: list[str], conv1d: bool
) -> LoraConfig:
    root = any(part.root for part in parts.values())
    parts = {key: part.with_rule(root) for key, part in parts.items()}
    r = Counter(part.rank for part in parts.values()).most_common(1)[0][0]
    alpha = Counter(part.alpha for part in parts.values()).most_common(1)[0][0]
    return LoraConfig(
        r=r,
        lora_alpha=_number(alpha),
        use_rslora=root,
        use_dora=any(part.magnitude is not None for part in parts.values()),
        rank_pattern={key: part.rank for key, part in parts.items() if part.rank != r},
        alpha_pattern={key: _number(part.alpha) for key, part in parts.items() if part.alpha != alpha},
        target_modules=targets,
        modules_to_save=sorted({*config.modules_to_save}) if config.modules_to_save else None,
        fan_in_fan_out=conv1d,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        layer_replication=config.layer_replication,
        inference_mode=True,
    )


def _number(value: float) -> Any:  # PEFT declares an int and takes both
    return int(value) if float(value).is_integer() else float(value)


def _heads(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Tensors of the modules saved whole, by their name in the base."""
    found: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper: Any = module  # PEFT's base class declares it without the state dict
            state = wrapper.adapter_state_dict(adapter, module.state_dict())
            found.update({f"{name}.{key}": tensor for key, tensor in state.items()})
    return found


def _card(lora: LoraConfig, what: str, model: nn.Module) -> str:
    base = lora.base_model_name_or_path
    named = base and not os.path.isabs(base)
    return (
        "---\nlibrary_name: peft\n" + (f"base_model: {base}\n" if named else "") + "tags:\n- lora\n---\n\n"
        f"# LoRA exported from a mixture of LoRA experts: {what}\n\n"
        f"Rank {lora.r}, alpha {lora.lora_alpha}{', rsLoRA' if lora.use_rslora else ''}"
        f"{', per-module ranks in rank_pattern' if lora.rank_pattern else ''}.\n\n"
        f"{_loading(lora, model)}"
    )


def _loading(lora: LoraConfig, model: nn.Module) -> str:
    """How to load it. A classifier's base has to be told how many labels there are, which no LoRA's config says."""
    if lora.task_type != "SEQ_CLS":
        return (
            "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, folder)\n```\n"
        )
    config: Any = getattr(model, "config", None)
    labels = {int(i): str(name) for i, name in sorted(config.id2label.items())}
    ids = {name: i for i, name in labels.items()}
    return (
        f"It has {len(labels)} labels: {', '.join(labels.values())}. The base is made with as many:\n\n"
        "```python\nfrom peft import AutoPeftModelForSequenceClassification\n\n"
        "model = AutoPeftModelForSequenceClassification.from_pretrained(\n"
        f"    folder, num_labels={len(labels)}, id2label={labels}, label2id={ids}\n)\n```\n"
    )

"""Whether stock PEFT will load an exported LoRA as it is: for some families it rewrites targets, or refuses them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils
from torch import Tensor, nn

from molora.errors import ConfigError

try:
    from peft.utils import transformers_weight_conversion as conversion
except ImportError:  # an older PEFT converts nothing
    conversion = None  # type: ignore[assignment]


def check_loadable(lora: LoraConfig, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Try on a copy what PEFT does with a LoRA's config and the names of its tensors when it loads them.

    Raises:
        ConfigError: it would put them elsewhere, drop them, or refuse them.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    try:
        moved = _moved(deepcopy(lora), model, tensors)
    except ValueError as error:
        raise ConfigError(f"stock PEFT loads no such LoRA on {kind}: {error}") from error
    if moved:
        raise ConfigError(
            f"stock PEFT takes {', '.join(moved[:4])} of {kind} for parts of its fused experts and would drop or misplace "
            "these tensors, so this LoRA cannot be exported.",
            hint="leave these layers out of target_modules (adapt attention), or use the mixture itself.",
        )


def _moved(lora: LoraConfig, model: Any, tensors: dict[str, Tensor]) -> list[str]:
    """Targets, or tensors, that are not where they were after PEFT's conversion."""
    refuse = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    before = set(lora.target_modules or ())
    if refuse is not None:
        for name in before:
            refuse(lora, model, name.rpartition(".")[2])
    if conversion is None:
        return []
    conversion.convert_peft_config_for_transformers(lora, model, conversions=None)
    gone = before - set(lora.target_modules or ())
    if gone:
        return sorted(gone)
    after = conversion.convert_peft_adapter_state_dict_for_transformers(model, lora, dict(tensors))
    return sorted(tensors.keys() - after.keys())

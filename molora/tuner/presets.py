"""Published methods as configs: one function per method, found by name through `preset`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.tuner.config import MoLoraConfig


def lora(**overrides: Any) -> MoLoraConfig:
    """One ordinary LoRA. Hu et al., arXiv:2106.09685: `y = W x + (alpha/r) B A x`, r=8, alpha=16.

    The weight over one expert is 1, so the gate has no parameters worth training and merging is exact.
    """
    return MoLoraConfig(
        **{"num_experts": 1, "r": 8, "lora_alpha": 16, "gate": {"kind": "constant"}, **overrides}
    )


def molora(**overrides: Any) -> MoLoraConfig:
    """MoLORA: a soft mixture of LoRA experts. Zadouri et al., arXiv:2309.05444.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary
    loss; A and G are N(0, 0.02²), B is 0; 10 experts, r=4, alpha=16. Nothing deviates.
    """
    gate = {"kind": "soft", "share": "linear", "init_std": 0.02}
    defaults = {
        "num_experts": 10,
        "r": 4,
        "lora_alpha": 16,
        "init": "gaussian",
        "init_std": 0.02,
        "gate": gate,
    }
    return MoLoraConfig(**{**defaults, **overrides})


def mola(**overrides: Any) -> MoLoraConfig:
    """MoLA with as many experts in every block. Gao et al., arXiv:2402.08562.

    `y = W x + Σ_{e in top 2} g_e (alpha/r) B_e A_e x`, weights renormalised over the chosen two, one gate per
    linear; r=8, alpha=16, dropout 0.05, balance loss off as released. The paper varies the number of experts
    by block; here it is one number (8). Deviations: one dropout mask for all experts instead of one each, and
    gate rows N(0, 0.02²) instead of uniform.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    defaults = {"num_experts": 8, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "gate": gate}
    return MoLoraConfig(**{**defaults, **overrides})


PRESETS: dict[str, Callable[..., MoLoraConfig]] = {"lora": lora, "mola": mola, "molora": molora}


def preset(name: str, **overrides: Any) -> MoLoraConfig:
    """The MoLoraConfig of a published method, with any field overridden.

    Raises:
        ConfigError: no preset of that name; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}.{did_you_mean(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    return PRESETS[name](**overrides)


def list_presets() -> list[str]:
    """Names of all presets."""
    return sorted(PRESETS)

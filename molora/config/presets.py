"""Published methods as adapter settings: one function per method. Pure data, no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from molora.config.suggest import did_you_mean
from molora.errors import ConfigError

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def lora() -> dict[str, Any]:
    """One ordinary LoRA. Hu et al., arXiv:2106.09685: `y = W x + (alpha/r) B A x`, r=8, alpha=16.

    The weight over one expert is 1, so the gate has no parameters worth training and merging is exact.
    """
    return {"num_experts": 1, "r": 8, "lora_alpha": 16, "gate": {"kind": "constant"}}


def molora() -> dict[str, Any]:
    """MoLORA: a soft mixture of LoRA experts. Zadouri et al., arXiv:2309.05444.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary
    loss; A and G are N(0, 0.02²), B is 0; 10 experts, r=4, alpha=16. Nothing deviates.
    """
    gate = {"kind": "soft", "share": "linear", "init_std": 0.02}
    return {"num_experts": 10, "r": 4, "lora_alpha": 16, "init": "gaussian", "init_std": 0.02, "gate": gate}


def mola() -> dict[str, Any]:
    """MoLA with as many experts in every block. Gao et al., arXiv:2402.08562.

    `y = W x + Σ_{e in top 2} g_e (alpha/r) B_e A_e x`, weights renormalised over the chosen two, one gate per
    linear; r=8, alpha=16, dropout 0.05, balance loss off as released. The paper varies the number of experts
    by block; here it is one number (8). Deviations: one dropout mask for all experts instead of one each, and
    gate rows N(0, 0.02²) instead of uniform.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    return {"num_experts": 8, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "gate": gate}


def loramoe() -> dict[str, Any]:
    """LoRAMoE: dense softmax mixtures on the feed-forward linears. Dou et al., arXiv:2312.09979.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x`, one gate per linear; 8 experts, r=4, alpha=32, dropout
    0.05. The localized balancing loss is off, as in the authors' script. Deviations: one dropout mask for all
    experts; gate rows N(0, 0.02²). `target_modules` are Llama's names; give those of your model.
    """
    gate = {"kind": "soft", "share": "linear"}
    return {
        "num_experts": 8, "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": FEED_FORWARD, "gate": gate,
    }  # fmt: skip


def adamole() -> dict[str, Any]:
    """AdaMoLE: as many experts as pass a learned threshold. Liu and Luo, arXiv:2405.00361.

    `p = softmax(G x)`, `t = sigmoid(w x + b) / E`, weights `relu(p - t)` over their sum; one gate and threshold
    per linear, q_proj and v_proj; E=4, alpha=16, dropout 0.05, r=2 per expert (the paper's 8, split over the
    experts) with scaling alpha/8. Balance loss: the authors' 0.01 is summed over gates and has floor k, here it is
    a mean with floor 1; with 0.01 per gate the sum over M gates is M times stronger there. Deviation: the loss is
    of the probabilities p, not of p - t, which may be negative.
    """
    gate = {"kind": "threshold", "threshold_learned": True, "renorm": "sum", "share": "linear"}
    return {
        "num_experts": 4, "r": 2, "lora_alpha": 16, "scaling": 2.0, "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"], "gate": gate, "aux_losses": {"balance": 0.01},
    }  # fmt: skip


def dynmole() -> dict[str, Any]:
    """DynMoLE: top-p, but all experts where the gate is unsure. Li et al., arXiv:2504.00661.

    Experts that make up 0.75 of `softmax(G x)`, at least two; all of them where the relative Tsallis entropy of
    index 1.1 is above 0.9; weights are the probabilities, not renormalised. One gate per linear of the feed-forward;
    6 experts, r=24, alpha=48. Its balance term, 0.001, has our floor of 1 up to the mass that is kept; its entropy
    term is not part of this preset.
    """
    gate = {
        "select": "entropy", "top_p": 0.75, "min_k": 2, "entropy_threshold": 0.9, "entropy_index": 1.1, "share": "linear",
    }  # fmt: skip
    return {
        "num_experts": 6, "r": 24, "lora_alpha": 48, "target_modules": FEED_FORWARD, "gate": gate,
        "aux_losses": {"balance": 0.001},
    }  # fmt: skip


def coin() -> dict[str, Any]:
    """CoIN's MOELoRA for tasks in sequence. Chen et al., arXiv:2403.08350.

    `y = W x + s Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary loss; 8 experts of
    rank 16 (128 in all) with the scaling of the total rank, 256/128 = 2; A is N(0, 0.01²).
    """
    gate = {"kind": "soft", "share": "linear"}
    return {
        "num_experts": 8, "r": 16, "lora_alpha": 32, "scaling": 2.0, "init": "gaussian", "init_std": 0.01, "gate": gate,
    }  # fmt: skip


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    method.__name__: method for method in (lora, molora, mola, loramoe, adamole, dynmole, coin)
}


def preset_settings(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings with some replaced; a `gate` map without `kind` replaces single fields of the gate.

    Raises:
        ConfigError: no preset of that name; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}.{did_you_mean(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    settings = PRESETS[name]()
    gate = overrides.get("gate")
    if isinstance(gate, Mapping) and "kind" not in gate:
        overrides = {**overrides, "gate": {**settings["gate"], **gate}}
    return {**settings, **overrides}


def summary(name: str) -> str:
    """What a preset is, in the first line of its description."""
    return (inspect.getdoc(PRESETS[name]) or "").splitlines()[0]

"""Methods that mix all experts, by what each token is, or have one expert."""

from __future__ import annotations

from typing import Any

from molora.config.presets.release import follows
from molora.config.presets.target_patterns import FEED_FORWARD

ONE_MASK = "One dropout mask serves all experts; there each has its own."
# A gate whose rows and biases start as those of a torch Linear: uniformly within ±1/√d.
AS_LINEAR = {"init": "uniform", "init_std": "linear"}


@follows("huggingface/peft", "5d602fd", "Hu et al., arXiv:2106.09685")
def lora() -> dict[str, Any]:
    """One ordinary LoRA: `y = W x + (alpha/r) B A x`, r=8, alpha=16.

    The weight over one expert is 1, so the gate has no parameters worth training and merging is exact. The release is
    PEFT, whose LoRA this is, values and gradients.
    """
    return {"num_experts": 1, "r": 8, "lora_alpha": 16, "gate": {"kind": "constant"}}


@follows(
    "for-ai/parameter-efficient-moe", "e2683fe", "Zadouri et al., arXiv:2309.05444",
    "The release trains with Adafactor, which is not offered here.",
    "The paper's other method, MoV, mixes IA3 vectors and has no LoRA experts; it is not here.",
    train={"max_steps": 500_000, "batch_size": 32, "lr": 3e-4, "schedule": "constant", "warmup": 0},
)  # fmt: skip
def molora() -> dict[str, Any]:
    """MoLORA: a soft mixture of LoRA experts.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary
    loss; A and G are N(0, 0.02²), B is 0; 10 experts, r=4, alpha=16.
    """
    gate = {"kind": "soft", "share": "linear", "init_std": 0.02}
    return {"num_experts": 10, "r": 4, "lora_alpha": 16, "init": "gaussian", "init_std": 0.02, "gate": gate}


@follows(
    "Ablustrund/LoRAMoE", "1177288", "Dou et al., arXiv:2312.09979",
    ONE_MASK,
    "The localized balancing loss, where turned on, goes by each task's own experts; there by two task types and "
    "halves of the experts, and it counts padding.",
    train={"epochs": 1, "lr": 2e-4, "schedule": "cosine", "warmup": 0.03},
)  # fmt: skip
def loramoe() -> dict[str, Any]:
    """LoRAMoE: dense softmax mixtures on the feed-forward linears.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x`, one gate per linear; 8 experts, r=4, alpha=32, dropout
    0.05. The localized balancing loss is off, as in the authors' script; `aux_losses={"localized": 0.1}` with `tasks`
    that name each task's experts turns it on.
    """
    gate = {"kind": "soft", "share": "linear", **AS_LINEAR}
    return {
        "num_experts": 8, "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": FEED_FORWARD, "gate": gate,
    }  # fmt: skip


@follows(
    "Clin0212/HydraLoRA", "afb693b", "Tian et al., arXiv:2404.19245",
    "A is multiplied once, with one dropout mask; there once for each expert, with a mask of its own.",
    "The number of experts is a number; the paper finds it by k-means on the data.",
    train={"epochs": 1, "accumulate": 8, "lr": 2e-4, "schedule": "cosine", "warmup": 0.03},
)  # fmt: skip
def hydralora() -> dict[str, Any]:
    """HydraLoRA: one A, several B, mixed densely.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A x` on the feed-forward linears, one gate per linear, no auxiliary
    loss; 4 experts, r=4, alpha=32, dropout 0.05. Gate rows must not be zero: experts of one A under equal weights would
    stay equal for ever.
    """
    gate = {"kind": "soft", "share": "linear", **AS_LINEAR}
    return {
        "num_experts": 4, "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "share_A": True,
        "target_modules": FEED_FORWARD, "gate": gate,
    }  # fmt: skip


@follows(
    "zackschen/CoIN", "4122465", "Chen et al., arXiv:2403.08350",
    "The scripts train the multimodal projector as well, at 2e-5.",
    train={"epochs": 1, "batch_size": 14, "accumulate": 8, "lr": 2e-4, "schedule": "cosine", "warmup": 0.03},
)  # fmt: skip
def coin() -> dict[str, Any]:
    """CoIN's MOELoRA for tasks in sequence.

    `y = W x + s Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary loss; 8 experts of
    rank 16 and alpha 32 (128 and 256 in all); A is N(0, 0.01²), dropout 0.05.
    """
    gate = {"kind": "soft", "share": "linear", **AS_LINEAR}
    return {
        "num_experts": 8, "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "init": "gaussian", "init_std": 0.01, "gate": gate,
    }  # fmt: skip


METHODS = (lora, molora, loramoe, hydralora, coin)

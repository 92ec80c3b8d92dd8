"""Methods in which each token has a fixed number of experts, by its scores."""

from __future__ import annotations

from typing import Any

from molora.config.presets.release import follows
from molora.config.presets.target_patterns import ATTENTION, FEED_FORWARD
from molora.config.presets.token_dense import AS_LINEAR, ONE_MASK

_MOE_PEFT = {"epochs": 2, "batch_size": 16, "lr": 2e-4, "schedule": "constant", "warmup": 0}
PER_GATE = "Balance is per gate; there all layers' tokens are pooled, which hides a collapse."
NO_CODE = (
    "No code is public and the paper leaves details open: what is not named here is this package's default."
)


@follows(
    "TUDB-Labs/MoE-PEFT", "40f8cb7", "Li et al., arXiv:2404.15159",
    PER_GATE,
    "Dropout may be 0; there it must not.",
    "The release's other variant, mixlora-switch (one expert, its probability as weight, tokens beyond an expert's "
    "capacity of 32 by sequence passed through), is not here: what a token gets would depend on the tokens before "
    "it, so that cached and batched answers differ, and at inference it adds no expert at all.",
    train=_MOE_PEFT,
)  # fmt: skip
def mixlora() -> dict[str, Any]:
    """MixLoRA: top-2 mixtures of whole feed-forwards, plain LoRA on attention.

    `y = Σ_{e in top 2} g_e FFN_e(x)`, weights over their sum, each linear of FFN_e with expert e's LoRA; one gate per
    block, its rows N(0, 0.02²), no jitter; 8 experts, r=16, alpha=32, dropout 0.05. Balance loss 0.001 with floor k=2 is
    0.002 here, where even use is 1.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "block"}
    return {
        "num_experts": 8, "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": FEED_FORWARD,
        "ffn_targets": FEED_FORWARD, "plain_targets": ATTENTION, "gate": gate, "aux_losses": {"balance": 0.002},
    }  # fmt: skip


@follows(
    "TUDB-Labs/MoE-PEFT", "40f8cb7", "Li et al., arXiv:2404.15159",
    PER_GATE,
    "The kept weights are divided by their sum; there they are not, which scales the frozen feed-forward down by what "
    "was left out.",
    "A temperature divides logits, there probabilities.",
    "The balance loss counts every slot there: 0.001 of it is 0.007 here while a gate is unsure and keeps 7 of 8, and less "
    "later, down to 0.001 where it keeps one.",
    train=_MOE_PEFT,
)  # fmt: skip
def mixlora_top_p() -> dict[str, Any]:
    """MixLoRA that keeps experts up to a probability of 0.8 (mixlora-dynamic).

    As `mixlora`, but experts are kept until they make up 0.8. Balance loss 0.001 with the number of experts kept as its
    floor, 7 of 8 for even probabilities, is 0.007 here.
    """
    gate = {"kind": "top_p", "top_p": 0.8, "renorm": "sum", "share": "block"}
    return {**mixlora(), "gate": gate, "aux_losses": {"balance": 0.007}}


@follows(
    "GCYZSL/MoLA", "01785c8", "Gao et al., arXiv:2402.08562",
    ONE_MASK,
    "All blocks have 8 experts; the paper's best allocation is `num_experts=[2, 4, 6, 8]`, a quarter of the blocks each "
    "(its reverse is [8, 6, 4, 2]), which needs blocks in multiples of four.",
    "The balance loss, where turned on, is a mean over gates that leaves padding out; there a sum over layers with it.",
    train={"epochs": 3, "batch_size": 8, "accumulate": 16, "lr": 3e-4, "schedule": "linear", "warmup": 100},
)  # fmt: skip
def mola() -> dict[str, Any]:
    """MoLA: top-2 mixtures on every linear, more experts in higher blocks.

    `y = W x + Σ_{e in top 2} g_e (alpha/r) B_e A_e x`, weights renormalised over the chosen two, one gate per
    linear; r=8, alpha=16, dropout 0.05, balance loss off as released.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear", **AS_LINEAR}
    return {"num_experts": 8, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "gate": gate}


@follows(
    None, None, "Luo et al., arXiv:2402.12851",
    NO_CODE,
    "The ranks (r=8, alpha=16), both coefficients (0.01) and the form of the contrastive loss are ours; the preset claims no "
    "more than the method's outline.",
)  # fmt: skip
def moelora_contrastive() -> dict[str, Any]:
    """MoELoRA whose experts are told apart by a contrastive loss.

    Top-2 of 8 experts per token with load balancing and a contrastive loss (see `molora.losses.contrastive`).
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    return {
        "num_experts": 8, "r": 8, "lora_alpha": 16, "gate": gate,
        "aux_losses": {"balance": 0.01, "contrastive": 0.01},
    }  # fmt: skip


@follows(
    "forwchen/LLaVA-MoLE", "5876301", "Chen et al., arXiv:2401.16160",
    "The choice is straight-through; there the gate gets no gradient from the task at all.",
    "The balance loss is of even floor 1, there 1/E, so that c there is c/E here; its coefficient is not in the release, "
    "which only infers, and 0.01 is ours.",
    "The released model mixes all experts (`dense_moe`); this is the paper's method, the best one.",
)  # fmt: skip
def llava_mole() -> dict[str, Any]:
    """LLaVA-MoLE: one expert per token and feed-forward, plain LoRA on attention.

    The best of 3 experts by `softmax(G x + b)` of the feed-forward's input, one choice for all its linears, added
    with weight 1; r=32, alpha=64, dropout 0.05.
    """
    gate = {"score": "linear", "bias": True, "select": "hard", "share": "block", **AS_LINEAR}
    return {
        "num_experts": 3, "r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "target_modules": FEED_FORWARD,
        "plain_targets": ATTENTION, "gate": gate, "aux_losses": {"balance": 0.01},
    }  # fmt: skip


@follows(None, None, "Yang et al., arXiv:2402.11260", NO_CODE)
def moral() -> dict[str, Any]:
    """MoRAL: LoRA experts for lifelong learning from question-answer pairs.

    A top-2 mixture of 8 experts per token, r=8, alpha=16, to be grown by `add_expert`; it claims nothing beyond the
    paper's outline.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    return {"num_experts": 8, "r": 8, "lora_alpha": 16, "gate": gate}


@follows(
    "Facico/GOAT-PEFT", "ef4d21a", "Fan et al., arXiv:2502.16894",
    ONE_MASK,
    "The base stays as it is: frozen copies of the starts, always on with weight -1/8 each, cancel their mean, at the "
    "price of twice the rank; there that mean is subtracted from the base weight and must be derived anew at every load.",
    "Balance loss 1e-3 with floor k is 0.002 here, as a mean over gates; theirs is the sum over gates.",
    train={"epochs": 10, "batch_size": 256, "lr": 1e-4, "schedule": "cosine", "warmup": 0.03},
)  # fmt: skip
def goat() -> dict[str, Any]:
    """GOAT: experts start as segments of the weight's singular vectors.

    Top-2 of 8, weights over their sum, one gate per linear; expert i starts as the i-th of 8 equally spaced segments
    of the SVD, a tenth of the weight's own size; r=4 per expert, alpha=64 and so scaling 16 (the script's rank 32 is split
    over the experts, its alpha is not; of the paper's variants the one without the theoretical factor), dropout 0.05. B is
    not 0 at the start, so outputs differ a little from the base's from the first step on.
    """
    experts, starts = [f"expert_{i}" for i in range(8)], [f"start_{i}" for i in range(8)]
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear", **AS_LINEAR}
    return {
        "num_experts": 16, "expert_names": experts + starts, "frozen_experts": starts,
        "always_on": dict.fromkeys(starts, -0.125), "r": 4, "lora_alpha": 64, "lora_dropout": 0.05, "init": "svd_segments",
        "gate": gate, "aux_losses": {"balance": 0.002},
    }  # fmt: skip


METHODS = (mixlora, mixlora_top_p, mola, moelora_contrastive, llava_mole, moral, goat)

"""Methods whose gate reads tokens."""

from __future__ import annotations

from typing import Any

from molora.config.presets.target_patterns import ATTENTION, FEED_FORWARD, QUERY_VALUE


def lora() -> dict[str, Any]:
    """One ordinary LoRA. Hu et al., arXiv:2106.09685: `y = W x + (alpha/r) B A x`, r=8, alpha=16.

    The weight over one expert is 1, so the gate has no parameters worth training and merging is exact.
    """
    return {"num_experts": 1, "r": 8, "lora_alpha": 16, "gate": {"kind": "constant"}}


def molora() -> dict[str, Any]:
    """MoLORA: a soft mixture of LoRA experts. Zadouri et al., arXiv:2309.05444.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary
    loss; A and G are N(0, 0.02²), B is 0; 10 experts, r=4, alpha=16. Nothing deviates. The paper's other method,
    MoV (mixtures of IA3 vectors), has no LoRA experts and is not here.
    """
    gate = {"kind": "soft", "share": "linear", "init_std": 0.02}
    return {"num_experts": 10, "r": 4, "lora_alpha": 16, "init": "gaussian", "init_std": 0.02, "gate": gate}


def mixlora() -> dict[str, Any]:
    """MixLoRA: top-2 mixtures of whole feed-forwards, plain LoRA on attention. Li et al., arXiv:2404.15159.

    `y = Σ_{e in top 2} g_e FFN_e(x)`, weights over their sum, each linear of FFN_e with expert e's LoRA; one gate per
    block; 8 experts, r=16, alpha=32, dropout 0.05. Balance loss 0.001 with floor k=2 is 0.002 here, per gate
    instead of pooled over layers, which hides a collapse. Deviations: no jitter (0 by default there as well), and
    dropout may be 0.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "block"}
    return {
        "num_experts": 8, "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": FEED_FORWARD,
        "ffn_targets": FEED_FORWARD, "plain_targets": ATTENTION, "gate": gate, "aux_losses": {"balance": 0.002},
    }  # fmt: skip


def mixlora_top_p() -> dict[str, Any]:
    """MixLoRA that keeps experts up to a probability of 0.8. Li et al., arXiv:2404.15159 (mixlora-dynamic).

    As `mixlora`, but experts are kept until they make up 0.8. Deviations: the kept weights are divided by their sum
    (there they are not, which scales the frozen feed-forward down by what was left out), and the temperature
    divides logits, not probabilities. The balance loss's floor is the mean number of experts kept there, 1 here.
    """
    gate = {"kind": "top_p", "top_p": 0.8, "renorm": "sum", "share": "block"}
    return {**mixlora(), "gate": gate}


def mola() -> dict[str, Any]:
    """MoLA: top-2 mixtures on every linear, more experts in higher blocks. Gao et al., arXiv:2402.08562.

    `y = W x + Σ_{e in top 2} g_e (alpha/r) B_e A_e x`, weights renormalised over the chosen two, one gate per
    linear; r=8, alpha=16, dropout 0.05, balance loss off as released. The paper's best allocation is
    `num_experts=[2, 4, 6, 8]`, a quarter of the blocks each (its reverse is [8, 6, 4, 2]); it needs blocks in multiples
    of four, so the preset has 8 everywhere. Deviations: one dropout mask for all experts instead of one each, and
    gate rows N(0, 0.02²) instead of uniform.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    return {"num_experts": 8, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "gate": gate}


def loramoe() -> dict[str, Any]:
    """LoRAMoE: dense softmax mixtures on the feed-forward linears. Dou et al., arXiv:2312.09979.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A_e x`, one gate per linear; 8 experts, r=4, alpha=32, dropout
    0.05. The localized balancing loss is off, as in the authors' script; `aux_losses={"localized": 0.1}` with `tasks`
    that name each task's experts turns it on. Deviations: one dropout mask for all experts; gate rows N(0, 0.02²).
    """
    gate = {"kind": "soft", "share": "linear"}
    return {
        "num_experts": 8, "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": FEED_FORWARD, "gate": gate,
    }  # fmt: skip


def hydralora() -> dict[str, Any]:
    """HydraLoRA: one A, several B, mixed densely. Tian et al., arXiv:2404.19245.

    `y = W x + (alpha/r) Σ_e softmax(G x)_e B_e A x` on the feed-forward linears, one gate per linear, no auxiliary
    loss; 4 experts, r=4, alpha=32, dropout 0.05. The paper finds the number of experts by k-means on the data; here it
    is a number. A is multiplied once with one dropout mask (there once per expert). Gate rows must not be zero:
    experts of one A under equal weights would stay equal for ever.
    """
    gate = {"kind": "soft", "share": "linear"}
    return {
        "num_experts": 4, "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "share_A": True,
        "target_modules": FEED_FORWARD, "gate": gate,
    }  # fmt: skip


def moelora_contrastive() -> dict[str, Any]:
    """MoELoRA whose experts are told apart by a contrastive loss. Luo et al., arXiv:2402.12851.

    Top-2 of 8 experts per token with load balancing and a contrastive loss. No code of the authors is public:
    the ranks (r=8, alpha=16), both coefficients (0.01) and the form of the contrastive loss (see
    `molora.losses.contrastive`) are ours; the preset claims no more than the method's outline.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    return {
        "num_experts": 8, "r": 8, "lora_alpha": 16, "gate": gate,
        "aux_losses": {"balance": 0.01, "contrastive": 0.01},
    }  # fmt: skip


def llava_mole() -> dict[str, Any]:
    """LLaVA-MoLE: one expert per token and feed-forward, plain LoRA on attention. Chen et al., arXiv:2401.16160.

    The best of 3 experts by `softmax(G x + b)` of the feed-forward's input, one choice for all its linears, added
    with weight 1; r=32, alpha=64, dropout 0.05. Deviations: the choice is straight-through (there the gate gets no
    gradient from the task at all). The balance loss there has floor 1/E, c is c/E here; its coefficient is not in the
    release, so 0.01 is ours.
    """
    gate = {"score": "linear", "bias": True, "select": "hard", "share": "block"}
    return {
        "num_experts": 3, "r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "target_modules": FEED_FORWARD,
        "plain_targets": ATTENTION, "gate": gate, "aux_losses": {"balance": 0.01},
    }  # fmt: skip


def moral() -> dict[str, Any]:
    """MoRAL: LoRA experts for lifelong learning from question-answer pairs. Yang et al., arXiv:2402.11260.

    No code is public and the paper does not fix the details. This is a top-2 mixture of 8 experts per token,
    r=8, alpha=16, to be grown by `add_expert`; it claims nothing beyond that outline.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}
    return {"num_experts": 8, "r": 8, "lora_alpha": 16, "gate": gate}


def adamole() -> dict[str, Any]:
    """AdaMoLE: as many experts as pass a learned threshold. Liu and Luo, arXiv:2405.00361.

    `p = softmax(G x)`, `t = sigmoid(w x + b) / E`, weights `relu(p - t)` over their sum; one gate and threshold
    per linear, queries and values; E=4, alpha=16, dropout 0.05, r=8 per expert (the release's 32, split over the
    experts), scaling alpha over the expert's rank. Balance loss: the authors' 0.01 is summed over gates and has floor
    k, here it is a mean with floor 1; with 0.01 per gate the sum over M gates is M times stronger there. Deviation:
    the loss is of the probabilities p, not of p - t, which may be negative.
    """
    gate = {"kind": "threshold", "threshold_learned": True, "renorm": "sum", "share": "linear"}
    return {
        "num_experts": 4, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
        "target_modules": QUERY_VALUE, "gate": gate, "aux_losses": {"balance": 0.01},
    }  # fmt: skip


def dynmole() -> dict[str, Any]:
    """DynMoLE: top-p, but all experts where the gate is unsure. Li et al., arXiv:2504.00661.

    Experts that make up 0.75 of `softmax(G x)`, at least two; all of them where the relative Tsallis entropy of
    index 1.1 is above 0.9; weights are the probabilities, not renormalised. One gate per linear of the feed-forward;
    6 experts, r=24, alpha=48. Entropy loss 0.01 of the relative entropy, balance loss 0.001. Deviations: the expert
    that crosses 0.75 is kept, as nucleus sampling does (the release drops it, but for the first two); the balance loss
    is of shares of the slots (there of the kept probabilities), per gate instead of pooled over layers.
    """
    gate = {
        "select": "entropy", "top_p": 0.75, "min_k": 2, "entropy_threshold": 0.9, "entropy_index": 1.1, "share": "linear",
    }  # fmt: skip
    return {
        "num_experts": 6, "r": 24, "lora_alpha": 48, "target_modules": FEED_FORWARD, "gate": gate,
        "aux_losses": {"balance": 0.001, "entropy": {"coefficient": 0.01, "index": 1.1}},
    }  # fmt: skip


def goat() -> dict[str, Any]:
    """GOAT: experts start as segments of the weight's singular vectors. Fan et al., arXiv:2502.16894.

    Top-2 of 8, weights over their sum, one gate per linear; expert i starts as the i-th of 8 equally spaced segments
    of the SVD, a tenth of the weight's own size; alpha/r scaling (of the paper's variants the one without the
    theoretical factor), r=4 per expert, alpha=8. There the mean of the starts is subtracted from the base weight;
    here the base stays as it is, and frozen copies of the starts, always on with weight -1/8 each, cancel them, at
    the price of twice the rank. B is not 0 at the start, so outputs differ a little from the base's from the first
    step on. Balance loss 1e-3 with floor k is 0.002 per gate here, where theirs is summed over gates.
    """
    experts, starts = [f"expert_{i}" for i in range(8)], [f"start_{i}" for i in range(8)]
    return {
        "num_experts": 16, "expert_names": experts + starts, "frozen_experts": starts,
        "always_on": dict.fromkeys(starts, -0.125), "r": 4, "lora_alpha": 8, "init": "svd_segments",
        "gate": {"kind": "top_k", "top_k": 2, "renorm": "sum", "share": "linear"}, "aux_losses": {"balance": 0.002},
    }  # fmt: skip


def coin() -> dict[str, Any]:
    """CoIN's MOELoRA for tasks in sequence. Chen et al., arXiv:2403.08350.

    `y = W x + s Σ_e softmax(G x)_e B_e A_e x` token by token, one gate per linear, no auxiliary loss; 8 experts of
    rank 16 and alpha 32 (128 and 256 in all); A is N(0, 0.01²).
    """
    gate = {"kind": "soft", "share": "linear"}
    return {
        "num_experts": 8, "r": 16, "lora_alpha": 32, "init": "gaussian", "init_std": 0.01, "gate": gate,
    }  # fmt: skip


def hmora() -> dict[str, Any]:
    """HMoRA: a gate per token and a gate per task, mixed differently in every layer. Liao et al., ICLR 2025.

    `p = (1 - α) p_token + α p_task`, α a learned number per gate that starts near 0 in the first block and near 1 in the
    last (logits -2 to 2); top-2 over their sum; one gate for linears of the same input, an mlp of 32 for tokens;
    8 experts, r=8, alpha=16 with rank-stabilised scaling, dropout 0.1; loss 0.01 on the mutual information of tokens
    and experts (the paper is at OpenReview: lTkHiXeuDl). Deviations: the task gate reads the prompt's mean at its layer, where
    theirs is a transformer encoder over the prompt's embeddings; both gates learn from one loss; weights are
    probabilities over their sum (there the softmax of probabilities); B learns as fast as A.
    """
    gate = {
        "kind": "top_k", "top_k": 2, "renorm": "sum", "score": "mlp", "hidden": 32, "blend": "sequence", "share": "group",
    }  # fmt: skip
    return {
        "num_experts": 8, "r": 8, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.1, "gate": gate,
        "aux_losses": {"mutual_information": 0.01},
    }  # fmt: skip


METHODS = (
    lora, molora, mixlora, mixlora_top_p, mola, loramoe, hydralora, moelora_contrastive, llava_mole, moral, adamole,
    dynmole, goat, hmora, coin,
)  # fmt: skip

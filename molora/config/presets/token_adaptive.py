"""Methods in which the number of experts, or who decides on them, differs from token to token or block to block."""

from __future__ import annotations

from typing import Any

from molora.config.presets.release import follows
from molora.config.presets.target_patterns import ATTENTION, FEED_FORWARD, OUTPUTS
from molora.config.presets.token_chosen import PER_GATE
from molora.config.presets.token_dense import AS_LINEAR, ONE_MASK


@follows(
    "zefang-liu/AdaMoLE", "5e8599a", "Liu and Luo, arXiv:2405.00361",
    ONE_MASK,
    "The loss is a mean over gates; there it is their sum, so that 1e-3 there is 1e-3 times the number of gates here.",
    train={
        "epochs": 2, "batch_size": 4, "accumulate": 4, "lr": 1e-4, "schedule": "constant", "warmup": 200,
    },
)  # fmt: skip
def adamole() -> dict[str, Any]:
    """AdaMoLE: as many experts as pass a learned threshold.

    `p = softmax(G x)`, `t = sigmoid(w x + b) / E`, weights `relu(p - t)` over their sum; one gate and threshold
    per linear, on attention; E=8, so t is at most 0.125, r=4 per expert (the 32 of the shipped config, split over the
    experts), alpha=16, scaling alpha over the expert's rank, dropout 0.05. The loss `margin`, 1e-3, is the release's load
    balancing: of p - t, so that it reaches the threshold.
    """
    gate = {"kind": "threshold", "threshold_learned": True, "renorm": "sum", "share": "linear", **AS_LINEAR}
    return {
        "num_experts": 8, "r": 4, "lora_alpha": 16, "lora_dropout": 0.05,
        "target_modules": ATTENTION, "gate": gate, "aux_losses": {"margin": 0.001},
    }  # fmt: skip


@follows(
    "mikecovlee/DynMoLE", "9354b27", "Li et al., arXiv:2504.00661",
    PER_GATE,
    "The expert that crosses 0.75 is kept, as nucleus sampling does; there it is dropped, but for the first two.",
    "The balance loss is of shares of the slots, there of the kept probabilities.",
    train={"epochs": 2, "batch_size": 16, "lr": 2e-4, "schedule": "constant", "warmup": 0},
)  # fmt: skip
def dynmole() -> dict[str, Any]:
    """DynMoLE: top-p, but all experts where the gate is unsure.

    Experts that make up 0.75 of `softmax(G x)`, at least two; all of them where the relative Tsallis entropy of
    index 1.1 is above 0.9; weights are the probabilities, not renormalised. One gate per linear of the feed-forward;
    6 experts, r=24, alpha=48, dropout 0.05. Entropy loss 0.01 of the relative entropy, balance
    loss 0.001. `gate={"entropy_form": "renyi"}` is the release's other entropy; its loss has `form`.
    """
    gate = {
        "select": "entropy", "top_p": 0.75, "min_k": 2, "entropy_threshold": 0.9, "entropy_index": 1.1, "share": "linear",
        **AS_LINEAR,
    }  # fmt: skip
    return {
        "num_experts": 6, "r": 24, "lora_alpha": 48, "lora_dropout": 0.05, "target_modules": FEED_FORWARD, "gate": gate,
        "aux_losses": {"balance": 0.001, "entropy": {"coefficient": 0.01, "index": 1.1}},
    }  # fmt: skip


@follows(
    "LiaoMengqi/HMoRA", "5215d21", "Liao et al., OpenReview:lTkHiXeuDl",
    "The task gate reads the prompt's mean at its layer, without bias; theirs reads a transformer encoder over the prompt's "
    "embeddings and a learned token, and has a loss of its own over the samples of accumulated batches.",
    "The loss is of the blended probabilities and a mean over gates; there of the token gate's alone and a sum over gates, "
    "so that 0.005 there is 0.005 times the number of gates here.",
    "What a gate reads is not dropped out; there it is, at 0.1.",
    "Weights are probabilities over their sum, there the softmax of probabilities.",
    "B learns as fast as A, there 1.2 times as fast.",
    "The script smooths labels by 0.1, which is not offered here.",
    train={
        "max_steps": 100_000, "batch_size": 8, "accumulate": 2, "lr": 5e-5, "schedule": "constant", "warmup": 500,
        "weight_decay": 0.01,
    },
)  # fmt: skip
def hmora() -> dict[str, Any]:
    """HMoRA: a gate per token and a gate per task, mixed differently in every layer.

    `p = (1 - α) p_token + α p_task`, α a learned number per gate that starts near 0 in the first block and near 1 in the
    last (logits -2 to 2); top-2 over their sum; one gate for linears of the same input, linear with bias; 8 experts of
    one A, r=8, alpha=8 with rank-stabilised scaling, dropout 0.1; plain LoRA on the outputs of attention and feed-forward;
    loss 0.005 on the mutual information of tokens and experts, in which a token's entropy counts as at least 0.5 and that
    of all together as at most 0.98 of the largest.
    """
    gate = {
        "kind": "top_k", "top_k": 2, "renorm": "sum", "bias": True, "blend": "sequence", "share": "group",
        **AS_LINEAR,
    }  # fmt: skip
    return {
        "num_experts": 8, "r": 8, "lora_alpha": 8, "use_rslora": True, "lora_dropout": 0.1, "share_A": True,
        "plain_targets": OUTPUTS, "gate": gate,
        "aux_losses": {"mutual_information": {"coefficient": 0.005, "certain": 0.5, "even": 0.98}},
    }  # fmt: skip


METHODS = (adamole, dynmole, hmora)

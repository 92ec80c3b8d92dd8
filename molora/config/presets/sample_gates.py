"""Methods whose gate reads a sample as a whole: its task, or features given with it."""

from __future__ import annotations

from typing import Any

from molora.config.presets.release import follows
from molora.config.presets.target_patterns import ATTENTION, QUERY_VALUE
from molora.config.presets.token_dense import AS_LINEAR


@follows(
    "liuqidong07/MOELoRA-peft", "2d9efa4", "Liu et al., arXiv:2310.18339",
    "There a table of tasks keeps row 0 for padding; here a task without an id has no row and adds nothing.",
    train={"max_steps": 8000, "batch_size": 4, "lr": 2e-4, "schedule": "linear", "warmup": 0},
)  # fmt: skip
def moelora() -> dict[str, Any]:
    """MOELoRA: one gate for the model, reading the task's embedding.

    `g = softmax(G u_task)`, `y = W x + s Σ_e g_e B_e A_e x`; u has 64 dimensions, one gate for all linears; 8 experts of
    rank 2 and alpha 4 (the paper's 16 and 32, split over them: s = 2); A is N(0, 0.01²),
    dropout 0.1. A sample of several tasks has the mean of their embeddings, as there. Weights depend on the task only,
    so merging per task is exact. Task ids are required.
    """
    gate = {"kind": "task_embedding", "embedding_dim": 64, "share": "global", **AS_LINEAR}
    return {
        "num_experts": 8, "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "init": "gaussian",
        "init_std": 0.01, "gate": gate,
    }  # fmt: skip


@follows(
    "gyhdog99/mocle", "eae3744", "Gou et al., arXiv:2312.12379",
    "The gate weights its expert once, the release squares the weight; and in float32, there in float16.",
    "Embedding and linear layer of the cluster are one matrix: the same set of functions, which starts as spread as that "
    "product, N(0, 1/3) with bias 0, but learns as one matrix does.",
)  # fmt: skip
def mocle() -> dict[str, Any]:
    """MoCLE: the cluster of the instruction picks an expert, a universal expert does the rest.

    The prompt's cluster, one of 64, comes in as a one-hot feature (`molora.data.clusters`); `p = softmax((G c + b +
    noise) / 0.05)`, the best of 4 experts with weight p, the universal expert with 1 - p; r=8, alpha=32, dropout 0.1;
    noise N(0, 0.1²) in training; one gate per linear, on queries and values.
    """
    gate = {
        "kind": "external", "feature_dim": 64, "share": "linear", "bias": True, "select": "top_k", "top_k": 1,
        "renorm": "none", "temperature": 0.05, "noise": "gaussian", "noise_std": 0.1,
        "init_std": 3**-0.5,
    }  # fmt: skip
    return {
        "num_experts": 5, "expert_names": ["cluster_0", "cluster_1", "cluster_2", "cluster_3", "universal"],
        "always_on": {"universal": "rest"}, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1,
        "target_modules": QUERY_VALUE, "gate": gate,
    }  # fmt: skip


_NEW_TASK = "A task that is added gets a new row and old rows stay as they are; in mttl all are drawn anew."


@follows("huggingface/peft", "5d602fd", "Ponti et al., arXiv:2202.13914", _NEW_TASK)
def poly() -> dict[str, Any]:
    """Polytropon: each task has a learned share of every skill, mixed by factors.

    `w = sigmoid(Z_task)` over its sum, `y = W x + (1/r) (Σ w B)(Σ w A) x`, Z uniform within ±0.001 at first; in training
    the sigmoid is a relaxed Bernoulli of temperature 1, as in PEFT; one table per linear; 4 skills, r=8. Task ids are
    required.
    """
    gate = {
        "kind": "task_table", "transform": "sigmoid", "noise": "logistic", "noise_std": 1.0, "share": "linear",
        "init": "uniform", "init_std": 0.001 / 3**0.5,
    }  # fmt: skip
    return {"num_experts": 4, "r": 8, "lora_alpha": 1, "combine": "factors", "gate": gate}


@follows(
    "huggingface/peft", "5d602fd", "Caccia et al., arXiv:2211.03831",
    _NEW_TASK,
    "A starts for 4 parts, √4 times larger than for one; where `splits` is replaced, `init_gain` is its root.",
)  # fmt: skip
def mhr() -> dict[str, Any]:
    """MHR: Polytropon with several heads.

    As `poly`, but inputs and outputs of a linear are cut into 4 parts, each with shares of its own; widths must be
    multiples of 4. A starts as a torch Linear of a part would: `init_gain` is √4.
    """
    settings = poly()
    return {**settings, "init_gain": 2.0, "gate": {**settings["gate"], "splits": 4}}


@follows(
    "pUmpKin-Co/MTL-LoRA", "7848a70", "Yang et al., arXiv:2410.09437",
    train={"epochs": 3, "batch_size": 8, "lr": 3e-4, "schedule": "linear", "warmup": 0.01},
)  # fmt: skip
def mtl_lora() -> dict[str, Any]:
    """MTL-LoRA: one A, a small matrix per task, several B mixed per task.

    `y = W x + (alpha/r) Σ_e softmax(w_task / 0.1)_e B_e Λ_task A x`, Λ the identity at first; 3 B's, r=8, alpha=16,
    dropout 0.05, one table per linear, on attention. `task_cores="diagonal"` is the release's `diagonal_format`. Task ids
    are required; per task the mixture merges exactly.
    """
    gate = {"kind": "task_table", "temperature": 0.1, "share": "linear", **AS_LINEAR}
    return {
        "num_experts": 3, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ATTENTION, "share_A": True,
        "task_cores": True, "gate": gate,
    }  # fmt: skip


METHODS = (moelora, mocle, poly, mhr, mtl_lora)

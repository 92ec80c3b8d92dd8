"""Methods over experts that exist already; `molora.compose(base, loras, preset=...)` builds them."""

from __future__ import annotations

from typing import Any


def xlora() -> dict[str, Any]:
    """X-LoRA: one gate for the model, reading the base's last hidden states. Buehler and Buehler, arXiv:2402.07148.

    The base runs first without experts; `g = softmax(C h + b)` of each token's last hidden state weights the experts of
    every linear. Experts are frozen when composed of LoRAs, and learn otherwise. `gate={"share": "linear"}` gives every
    linear weights of its own, the paper's layer-wise scalings for a classifier of depth 1. No noise, no auxiliary
    loss. The first pass costs a second forward; generation keeps a second key-value cache instead of running the
    prefix again for each token. Deviation: the classifier starts at N(0, 0.02²) and is float32.
    """
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": {"kind": "two_pass", "bias": True}}


def arrow() -> dict[str, Any]:
    """Arrow: tokens go to the experts whose main direction they share. Ostapenko et al., arXiv:2405.11157.

    Scores `|x · v_e|`, v_e the top right singular vector of B_e A_e; softmax over the best 3; one gate per linear,
    nothing trained: `molora.compose(base, loras, preset="arrow", fit="arrow")`. As in PEFT, x is not normalised and the
    temperature is 1. Deviation: the vectors are exact (PEFT iterates from a random start), and kept with the adapter.
    """
    gate = {"kind": "top_k", "top_k": 3, "renorm": "softmax", "absolute": True, "share": "linear"}
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": gate}


def phatgoose() -> dict[str, Any]:
    """PHATGOOSE: each expert learns alone when it is wanted. Muqeeth et al., arXiv:2402.05859.

    A row per expert and linear is trained by `y = base(x) + sigmoid(row · x) expert(x)`, 100 steps at lr 1e-3, everything
    else frozen (`molora.fit_gate(model, "phatgoose", data)`); then tokens go to the best 2 by the product of
    standardised x and row over √d, softmax over the two. Deviation: the release's reversed straight-through is not
    copied; nothing here is hard.
    """
    gate = {
        "kind": "top_k", "top_k": 2, "renorm": "softmax", "score": "cosine", "norm": "layer", "share": "linear",
    }  # fmt: skip
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": gate}


def lorahub() -> dict[str, Any]:
    """LoraHub: one fixed weight per LoRA for the whole model, found on few examples. Huang et al., arXiv:2307.13269.

    `(Σ w A, Σ w B)` as one LoRA everywhere, w from 0, with 0.05 · mean |w| added to the loss. Deviation: w learns by
    gradient, where the paper searches without (within ±1.5). The result merges exactly. Only over LoRAs that exist:
    zero weights over experts whose B is 0 would never move.
    """
    gate = {"kind": "constant", "share": "global", "transform": "identity"}
    return {
        "num_experts": 4, "r": 8, "lora_alpha": 16, "combine": "factors", "gate": gate, "aux_losses": {"l1": 0.05},
    }  # fmt: skip


def meteora() -> dict[str, Any]:
    """MeteoRA: gates over existing LoRAs that are told the task. Xu et al., arXiv:2405.13053.

    Softmax over the best 2 scores of every token and linear; gate rows N(0, 1); only gates learn, with 50 times the
    cross-entropy of the gate's logits with the task's expert, here the mean over gates. Each task needs experts of its
    own: task i has expert i unless `tasks` says otherwise. Deviation: any number of experts (28 there).
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "softmax", "share": "linear", "init_std": 1.0}
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": gate, "aux_losses": {"task_label": 50.0}}


METHODS = (xlora, arrow, phatgoose, lorahub, meteora)

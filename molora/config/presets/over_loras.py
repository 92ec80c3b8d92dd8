"""Methods over experts that exist already; `molora.compose(base, loras, preset=...)` builds them."""

from __future__ import annotations

from typing import Any

from molora.config.presets.release import follows
from molora.config.presets.token_dense import AS_LINEAR


@follows(
    "huggingface/peft", "5d602fd", "Buehler and Buehler, arXiv:2402.07148",
    "The classifier is float32, there of the model's dtype, and has depth 1.",
    "Generation keeps a second key-value cache; there it runs the whole prefix twice for each token.",
)  # fmt: skip
def xlora() -> dict[str, Any]:
    """X-LoRA: one gate for the model, reading the base's last hidden states.

    The base runs first without experts; `g = softmax(C h + b)` of each token's last hidden state weights the experts of
    every linear. Experts are frozen when composed of LoRAs, and learn otherwise. `gate={"share": "linear"}` gives every
    linear weights of its own, the paper's layer-wise scalings. No noise, no auxiliary loss. The first pass costs a
    second forward.
    """
    return {
        "num_experts": 4,
        "r": 8,
        "lora_alpha": 16,
        "gate": {"kind": "two_pass", "bias": True, **AS_LINEAR},
    }


@follows(
    "huggingface/peft", "5d602fd", "Ostapenko et al., arXiv:2405.11157",
    "The vectors are exact, where PEFT iterates from a random start, and are kept with the adapter.",
    "Subtracting general knowledge from the experts is not here: there it works on A and B one by one, and for good.",
)  # fmt: skip
def arrow() -> dict[str, Any]:
    """Arrow: tokens go to the experts whose main direction they share.

    Scores `|x · v_e|`, v_e the top right singular vector of B_e A_e; softmax over the best 3; one gate per linear,
    nothing trained: `molora.compose(base, loras, preset="arrow", fit="arrow")`. As in PEFT, x is not normalised and the
    temperature is 1.
    """
    gate = {"kind": "top_k", "top_k": 3, "renorm": "softmax", "absolute": True, "share": "linear"}
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": gate}


@follows(
    "r-three/phatgoose", "4fd5790", "Muqeeth et al., arXiv:2402.05859",
    "The release's reversed straight-through is not copied; nothing here is hard.",
    "Experts have r=8 and alpha=16 unless they come from LoRAs; the release trains rank 16 at the same rate for 1000 steps.",
    train={"max_steps": 100, "lr": 5e-3, "schedule": "constant", "warmup": 0.06},
)  # fmt: skip
def phatgoose() -> dict[str, Any]:
    """PHATGOOSE: each expert learns alone when it is wanted.

    A row per expert and linear is trained by `y = base(x) + sigmoid(row · x) expert(x)`, 100 steps at 5e-3, everything
    else frozen (`molora.fit_gate(model, "phatgoose", data)`); then tokens go to the best 2 by the product of
    standardised x and row over √d, softmax over the two.
    """
    gate = {
        "kind": "top_k", "top_k": 2, "renorm": "softmax", "score": "cosine", "norm": "layer", "share": "linear",
    }  # fmt: skip
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": gate}


@follows(
    "sail-sg/lorahub", "df73afe", "Huang et al., arXiv:2307.13269",
    "The weights learn by gradient, where the release searches without, within ±1.5.",
)  # fmt: skip
def lorahub() -> dict[str, Any]:
    """LoraHub: one fixed weight per LoRA for the whole model, found on few examples.

    `(Σ w A, Σ w B)` as one LoRA everywhere, w from 0, with 0.05 · mean |w| added to the loss. The result merges exactly.
    Only over LoRAs that exist: zero weights over experts whose B is 0 would never move.
    """
    gate = {"kind": "constant", "share": "global", "transform": "identity"}
    return {
        "num_experts": 4, "r": 8, "lora_alpha": 16, "combine": "factors", "gate": gate, "aux_losses": {"l1": 0.05},
    }  # fmt: skip


@follows(
    "NJUDeepEngine/meteora", "2d192ad", "Xu et al., arXiv:2405.13053",
    "The task's cross-entropy is a mean over gates and a token's task may have several experts; any number of experts, 28 "
    "there.",
    "Experts that come from LoRAs stay as they are; the released script trains them with the gates.",
    train={
        "max_steps": 15_000, "batch_size": 4, "accumulate": 2, "lr": 5e-4, "schedule": "cosine", "warmup": 0.005,
        "clip": 0.3,
    },
)  # fmt: skip
def meteora() -> dict[str, Any]:
    """MeteoRA: gates over existing LoRAs that are told the task.

    Softmax over the best 2 scores of every token and linear; gate rows N(0, 1); only gates learn, with 50 times the
    cross-entropy of the gate's logits with the task's expert. Each task needs experts of its
    own: task i has expert i unless `tasks` says otherwise.
    """
    gate = {"kind": "top_k", "top_k": 2, "renorm": "softmax", "share": "linear", "init_std": 1.0}
    return {"num_experts": 4, "r": 8, "lora_alpha": 16, "gate": gate, "aux_losses": {"task_label": 50.0}}


METHODS = (xlora, arrow, phatgoose, lorahub, meteora)

"""Random mixtures: any gate with any combination; most of them make sense, the others must be refused."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from molora.config.choices import GATE_CHOICES
from molora.config.gate import BY_SAMPLE
from molora.config.gate_rules import SCORES, without_idle
from molora.config.losses import AUX_LOSSES
from tests.zoo import FEED_FORWARD, TASKS

SEEDS = st.integers(0, 99)


def sometimes(values: Any, usual: Any) -> Any:
    """Mostly the usual value."""
    return st.one_of(st.just(usual), st.just(usual), st.just(usual), values)


@st.composite
def gates(draw: Any, scope: str) -> dict[str, Any]:
    """Every long field; the score fits the scope, other fields need not fit each other."""
    gate: dict[str, Any] = {"scope": scope, "score": draw(st.sampled_from(SCORES[scope]))}
    if gate["score"] == "none":
        return {
            **gate,
            "transform": "identity",
            "select": "hard",
            "share": draw(st.sampled_from(["group", "global"])),
        }
    shares = (
        ("linear", "group", "block")
        if scope in ("token", "sequence")
        else ("linear", "group", "block", "global")
    )
    gate |= {
        "share": draw(st.sampled_from(shares)),
        "transform": draw(sometimes(st.sampled_from([*GATE_CHOICES["transform"]]), "softmax")),
        "select": draw(st.sampled_from([*GATE_CHOICES["select"]])),
        "renorm": draw(sometimes(st.sampled_from(GATE_CHOICES["renorm"]), None)),
        "temperature": draw(sometimes(st.floats(0.2, 3.0), 1.0)),
        "noise": draw(sometimes(st.sampled_from(["gaussian", "gumbel", "logistic"]), None)),
        "noise_std": draw(st.floats(0.01, 0.5)),
        "init": draw(st.sampled_from([*GATE_CHOICES["init"]])),
        "init_std": draw(sometimes(st.floats(0.0, 1.0) | st.just("linear"), 0.3)),
    }
    extra = {
        "top_k": st.integers(1, 3), "top_p": st.floats(0.1, 1.0), "min_k": st.integers(1, 2), "bias": st.booleans(),
        "absolute": st.booleans(), "norm": st.sampled_from(GATE_CHOICES["norm"]), "splits": st.sampled_from([1, 2]),
        "balance_rate": st.sampled_from([0.0, 0.01]), "threshold_learned": st.booleans(),
        "blend": st.just("sequence"), "pool": st.sampled_from(GATE_CHOICES["pool"]), "entropy_threshold": st.floats(0.1, 1.0),
        "entropy_form": st.sampled_from([*GATE_CHOICES["entropy_form"]]),
    }  # fmt: skip
    for name in draw(st.lists(st.sampled_from(sorted(extra)), unique=True, max_size=3)):
        gate[name] = draw(extra[name])
    if scope == "external":
        gate["feature_dim"] = 6
    # Mostly only what acts: a field that does not is refused, and there are many.
    return gate if draw(sometimes(st.just(True), False)) else without_idle(gate, {})


@st.composite
def adapters(draw: Any) -> dict[str, Any]:
    """The settings of a mixture on a small model of two blocks."""
    scope = draw(st.sampled_from(sorted(SCORES)))
    most = draw(st.integers(1, 4))
    num_experts: Any = draw(sometimes(st.just([max(1, most - 1), most]), most))
    names = [f"expert_{i}" for i in range(most)]
    combines = ["outputs", "factors"] if scope in BY_SAMPLE else ["outputs"]
    settings: dict[str, Any] = {
        "num_experts": num_experts, "r": draw(sometimes(st.sampled_from([[1, 3], {".*q_proj": 2}]), 2)),
        "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "gate": draw(gates(scope)),
        "combine": draw(st.sampled_from(combines)), "share_A": draw(sometimes(st.just(True), False)),
        "init": draw(sometimes(st.sampled_from(["gaussian", "orthogonal", "svd_segments"]), "kaiming")),
        "ffn_targets": draw(sometimes(st.just(FEED_FORWARD), None)),
    }  # fmt: skip
    if settings["share_A"] and scope == "task":
        settings["task_cores"] = draw(st.sampled_from([False, True, "diagonal"]))
    if most > 1 and draw(sometimes(st.just(True), False)):
        settings["always_on"] = {draw(st.sampled_from(names)): draw(st.sampled_from(["rest", 0.5, -1]))}
    if scope == "task" or draw(st.booleans()):
        chosen = st.lists(st.sampled_from(names), min_size=1, unique=True)
        settings["tasks"] = {task: draw(chosen) for task in TASKS}
    losses = draw(st.lists(st.sampled_from(sorted(AUX_LOSSES)), unique=True, max_size=2))
    settings["aux_losses"] = dict.fromkeys(losses, 0.1)
    return settings

"""GateSettings: the axes of a gate, declared once. Recipes, GateConfig, messages and the docs' tables come from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationInfo
from pydantic_core import PydanticKnownError

from molora.config.choices import GATE_CHOICES
from molora.config.section import ExpertCount, NonNegative, Positive, Width
from molora.config.setting import numbers_of, setting

UNNORMALISED = ("identity", "gain")
"""Transforms that give no probabilities."""

BY_SAMPLE = ("sequence", "task", "external", "constant")
"""Scopes whose weights are the same for all tokens of a sample."""


def _known(value: Any, info: ValidationInfo) -> Any:
    allowed = GATE_CHOICES[str(info.field_name)]
    if not isinstance(value, str) or value not in allowed:
        raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, allowed))})
    return value


Choice = Annotated[str, BeforeValidator(_known)]
"""One of `GATE_CHOICES` of the field's own name."""


@dataclass
class GateSettings:
    """Who decides the weights: the gate's axes. Defaults: token-wise top-2 softmax, shared per group."""

    scope: Choice = setting(
        "token",
        "what the gate reads: `token`; `sequence` (the tokens pooled; of a causal model the prompt's); `task` (the id: hard, "
        "or learned with score table or embedding); `external` (features given with the call); `two_pass` (last hidden "
        "states of the base itself, run first); `constant` (nothing; learned).",
    )
    pool: Choice = setting(
        "mean",
        "of the sequence: `mean`, `last` or `first` attended token.",
        acts_with={"scope": ["sequence"], "blend": ["sequence"]},
    )
    blend: Choice = setting(
        "none",
        "of scope token: `sequence` mixes in a second gate that reads the sequence, pooled; the probabilities are `(1 - α)` "
        "times the token's and `α` times the sequence's, α one learned number per gate (HMoRA).",
    )
    blend_spread: NonNegative = setting(
        2.0,
        "logits of α start evenly between minus this in the first block and plus this in the last.",
        acts_with={"blend": ["sequence"]},
    )
    feature_dim: Width | None = setting(None, "of scope `external`: width of the features.")
    share: str = setting(
        "group",
        "one gate per `linear`, per `group` of linears that read the same input, per `block` of the transformer (its first "
        "adapted linear's input decides for all), `global` (task, external, two_pass and constant scopes), or a regular "
        "expression on module names whose first group names the gate.",
    )
    score: str = setting(
        "linear",
        "`linear`, `mlp` (one hidden layer, ReLU), `cosine` (of what is read and the expert's row), or a name from "
        "`molora.register_score`; for task scope `none` (hard), `table` (logits per task) or `embedding` (a vector per task, "
        "then linear); `table` for constant.",
    )
    bias: bool = setting(False, "a learned number per expert on top of a linear, mlp or embedding score.")
    hidden: Width = setting(32, "width of the mlp's hidden layer.", acts_with={"score": ["mlp"]})
    norm: Choice = setting(
        "unit",
        "`unit` length, or `layer`: both sides standardised, their product over the root of d.",
        acts_with={"score": ["cosine"]},
    )
    absolute: bool = setting(
        False, "the score's absolute value counts.", acts_with={"score": ["linear", "cosine"]}
    )
    embedding_dim: Width = setting(64, "width of a task's vector.", acts_with={"score": ["embedding"]})
    splits: Width = setting(
        1,
        "of a table with combine `factors`: inputs and outputs are cut into so many parts, each with weights of its own.",
    )
    transform: Choice = setting(
        "softmax",
        "`softmax`, `sigmoid` (divided by its sum), `identity`, or `gain`: |2 sigmoid(4 score) - 1|, which is 0 where the "
        "score is (GainLoRA).",
    )
    select: Choice = setting(
        "top_k",
        "`dense`; `top_k`; `top_p` (until they make up top_p); `threshold` (what is above it); `entropy` (top_p, or all "
        "experts where the gate is unsure); `hard` (the best one, weight 1, straight-through).",
    )
    top_k: ExpertCount | list[ExpertCount] | dict[str, ExpertCount] = setting(
        2, "experts per token under `top_k`: a number, a list by block, or `{pattern: number}`."
    )
    top_p: Positive = setting(
        0.8, "share of the probability that is kept.", acts_with={"select": ["top_p", "entropy"]}
    )
    min_k: ExpertCount = setting(
        1, "experts that are kept at least.", acts_with={"select": ["top_p", "entropy"]}
    )
    threshold: NonNegative | None = setting(
        None,
        "None means 1 / num_experts of the config as first made (1/2 for one expert).",
        acts_with={"select": ["threshold"]},
    )
    threshold_learned: bool = setting(
        False, "the threshold is `sigmoid(w x + b)` times that.", acts_with={"select": ["threshold"]}
    )
    entropy_threshold: Positive = setting(
        0.9, "relative entropy above which all experts are kept.", acts_with={"select": ["entropy"]}
    )
    entropy_index: Positive = setting(
        1.1, "index of that entropy; 1 is Shannon's.", acts_with={"select": ["entropy"]}
    )
    entropy_form: Choice = setting(
        "tsallis", "which entropy: `tsallis` or `renyi`.", acts_with={"select": ["entropy"]}, later=True
    )
    renorm: Choice | None = setting(
        None,
        "`none`, `sum`, or `softmax` over the selected scores (top_k). None means `sum` for top_k > 1 and for thresholds, "
        "and `none` otherwise and with transform `identity`. Where a list or map of top_k has a 1, the one expert keeps its "
        "probability as weight.",
    )
    balance_rate: NonNegative = setting(
        0.0,
        "of top_k: loss-free balancing: a number per expert, added for the choice only, moves by this much after every "
        "training forward towards experts used less than their share.",
    )
    temperature: Positive = setting(1.0, "divides the logits.")
    noise: Choice | None = setting(
        None,
        "in training only: `gaussian` adds N(0, noise_std²) to the logits, `gumbel` adds Gumbel noise times noise_std, "
        "`logistic` logistic noise times noise_std (with sigmoid: a relaxed Bernoulli), `jitter` multiplies what the gate "
        "reads by U(1 - noise_std, 1 + noise_std).",
    )
    noise_std: NonNegative = setting(1.0, "the noise's strength.", acts_with={"noise": []})
    init: Choice = setting(
        "normal", "how the initial rows are spread around 0: `normal` or `uniform`.", later=True
    )
    init_std: Literal["linear"] | NonNegative = setting(
        0.02,
        "standard deviation of the initial rows; `linear`: 1/√(3 · width of what they read), and biases, which are 0 else, "
        "start like them: with init `uniform` as a torch Linear does.",
    )
    start: float = setting(
        0.0,
        "what the numbers start at; 1 with transform `identity` adds experts up. With 0 and new experts, whose B is 0, "
        "nothing would ever move.",
        acts_with={"scope": ["constant"]},
    )

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters: not where the task id alone decides."""
        return not (self.scope == "task" and self.score == "none")

    @property
    def alone_is_one(self) -> bool:
        """Whether one expert alone always has weight 1."""
        return self.transform not in UNNORMALISED and (self.select != "threshold" or self.renorm == "sum")

    def default_renorm(self) -> str:
        """What `renorm=None` stands for."""
        several = self.select == "threshold" or (self.select == "top_k" and self.top_k != 1)
        return "sum" if several and self.transform not in UNNORMALISED else "none"

    @property
    def sums_to_one(self) -> bool:
        """Whether a token's weights always sum to 1 (or 0, where nothing passes a threshold)."""
        if self.transform in UNNORMALISED:
            return not self.learned
        if self.select == "top_k" and self.top_k != 1 and 1 in numbers_of(self.top_k):
            return False  # the one expert of some layers is weighted by its probability
        renorm = self.renorm or self.default_renorm()
        return self.select in ("dense", "hard") or renorm in ("sum", "softmax")

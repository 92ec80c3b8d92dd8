"""GateConfig: the axes of a gate, and the shorthand kinds that expand to them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from molora.config.choices import GATE_KINDS
from molora.config.gate_rules import BY_SAMPLE, UNNORMALISED, default_renorm, gate_problems, is_hard_task
from molora.config.suggest import did_you_mean
from molora.errors import ConfigError


@dataclass
class GateConfig:
    """Who decides the weights: the gate's axes. Defaults: token-wise top-2 softmax, shared per group.

    Args:
        scope: what the gate reads: `token`; `sequence` (the tokens pooled; of a causal model the prompt's);
            `task` (the id: hard, or learned with score table or embedding); `external` (features given with the
            call); `two_pass` (last hidden states of the base itself, run first); `constant` (nothing; learned).
        pool: of `sequence`: `mean`, `last` or `first` attended token.
        blend: of scope token: `sequence` mixes in a second gate that reads the sequence, pooled; the probabilities are
            `(1 - α)` times the token's and `α` times the sequence's, α one learned number per gate (HMoRA).
        blend_spread: logits of α start evenly between minus this in the first block and plus this in the last.
        feature_dim: of `external`: width of the features.
        share: one gate per `linear`, per `group` of linears that read the same input, per `block` of the
            transformer (its first adapted linear's input decides for all), `global` (task, external, two_pass and
            constant scopes), or a regular expression on module names whose first group names the gate.
        score: `linear`, `mlp` (one hidden layer, ReLU), `cosine` (of what is read and the expert's row), or a name
            from `molora.register_score`; for task scope `none` (hard), `table` (logits per task) or `embedding` (a
            vector per task, then linear); `table` for constant.
        bias: a learned number per expert on top of a linear, mlp or embedding score.
        hidden: width of the mlp's hidden layer.
        norm: of cosine: `unit` length, or `layer`: both sides standardised, their product over the root of d.
        absolute: the score's absolute value counts.
        embedding_dim: width of a task's vector.
        splits: of a table with combine="factors": inputs and outputs are cut into so many parts, each with
            weights of its own.
        transform: `softmax`, `sigmoid` (divided by its sum), `identity`, or `gain`: |2 sigmoid(4 score) - 1|, which is 0
            where the score is (GainLoRA).
        select: `dense`; `top_k`; `top_p` (until they make up top_p); `threshold` (what is above it); `entropy`
            (top_p, or all experts where the gate is unsure); `hard` (the best one, weight 1, straight-through).
        top_k: experts per token under `top_k`: a number, a list by block, or `{pattern: number}`.
        top_p: share of the probability that `top_p` and `entropy` keep.
        min_k: experts that `top_p` and `entropy` keep at least.
        threshold: of `threshold`; None means 1 / num_experts of the config as first made (1/2 for one expert).
        threshold_learned: the threshold is `sigmoid(w x + b)` times that.
        entropy_threshold: relative entropy above which `entropy` keeps all experts.
        entropy_index: Tsallis index of that entropy; 1 is Shannon's.
        renorm: `none`, `sum`, or `softmax` over the selected scores (top_k). None means `sum` for top_k > 1 and for
            thresholds, and `none` otherwise and with transform `identity`. Where a list or map of top_k has a 1, the
            one expert keeps its probability as weight.
        balance_rate: of top_k: loss-free balancing: a number per expert, added for the choice only, moves by this
            much after every training forward towards experts used less than their share.
        temperature: divides the logits.
        noise: in training only: `gaussian` adds N(0, noise_std²) to the logits, `gumbel` adds Gumbel noise times
            noise_std, `logistic` logistic noise times noise_std (with sigmoid: a relaxed Bernoulli), `jitter`
            multiplies what the gate reads by U(1 - noise_std, 1 + noise_std).
        noise_std: its strength.
        init_std: standard deviation of the initial rows.
        start: what the numbers of a constant gate start at; 1 with transform `identity` adds experts up. With 0 and
            new experts, whose B is 0, nothing would ever move.
    """

    scope: str = "token"
    pool: str = "mean"
    blend: str = "none"
    blend_spread: float = 2.0
    feature_dim: int | None = None
    share: str = "group"
    score: str = "linear"
    bias: bool = False
    hidden: int = 32
    norm: str = "unit"
    absolute: bool = False
    embedding_dim: int = 64
    splits: int = 1
    transform: str = "softmax"
    select: str = "top_k"
    top_k: int | list[int] | dict[str, int] = 2
    top_p: float = 0.8
    min_k: int = 1
    threshold: float | None = None
    threshold_learned: bool = False
    entropy_threshold: float = 0.9
    entropy_index: float = 1.1
    renorm: str | None = None
    balance_rate: float = 0.0
    temperature: float = 1.0
    noise: str | None = None
    noise_std: float = 1.0
    init_std: float = 0.02
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.scope == "task" and self.score in ("linear", "none"):
            # one meaning only: the long fields follow from the scope
            self.score, self.transform, self.select = "none", "identity", "hard"
        if self.scope == "constant" and self.score == "linear":
            self.score = "table"
        for field, message in gate_problems(asdict(self)):
            raise ConfigError(f"gate.{field}={getattr(self, field)!r}: {message}")

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters."""
        return not is_hard_task(asdict(self))

    @property
    def by_sample(self) -> bool:
        """Whether all tokens of a sample have the same weights."""
        return self.scope in BY_SAMPLE

    @property
    def alone_is_one(self) -> bool:
        """Whether one expert alone always has weight 1."""
        return self.transform not in UNNORMALISED and (self.select != "threshold" or self.renorm == "sum")

    def default_renorm(self) -> str:
        """What `renorm=None` stands for."""
        return default_renorm(asdict(self))


def gate_from_kind(kind: str, **settings: Any) -> GateConfig:
    """A GateConfig from a shorthand of `GATE_KINDS` plus the fields it leaves open."""
    if kind not in GATE_KINDS:
        raise ConfigError(
            f"gate.kind={kind!r} is not one of {', '.join(GATE_KINDS)}.{did_you_mean(kind, GATE_KINDS)}"
        )
    return GateConfig(**{**GATE_KINDS[kind], **settings})

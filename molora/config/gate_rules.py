"""What makes sense together in a gate: one set of rules for recipes and for Python, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from molora.config.choices import GATE_CHOICES, GATE_KINDS, SHARES
from molora.config.gate import UNNORMALISED, GateSettings
from molora.config.patterns import pattern_problem
from molora.config.setting import acts, default_of, idle_problems, numbers_of, value_problems
from molora.config.suggest import did_you_mean, not_one_of
from molora.config.types import type_problems

SCORES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("token", "sequence", "external", "two_pass"), ("linear", "mlp", "cosine")),
    "task": ("none", "table", "embedding"),
    "constant": ("table",),
}
"""The scores that go with each scope. Scores that users register go with every scope that reads something."""


def without_idle(gate: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A gate's fields (or its `kind` and some of them) without those that do not act, unless they are in `given`."""
    declared = fields(GateSettings)
    whole = {f.name: default_of(f) for f in declared} | GATE_KINDS.get(gate.get("kind", ""), {}) | dict(gate)
    idle = [f.name for f in declared if f.name in gate and not acts(f, whole)]
    return {name: value for name, value in gate.items() if name in given or name not in idle}


def gate_problems(gate: GateSettings) -> Iterator[tuple[str, str]]:
    """Field and message of everything wrong with a gate by itself."""
    unknown = [*type_problems(gate, GateSettings)] or [*_unknown_choices(gate)]
    yield from unknown
    if not unknown:
        for rules in (_numbers, _scope, _score, _noise, _selection, idle_problems):
            yield from rules(gate)


def size_problems(gate: GateSettings, num_experts: int) -> Iterator[tuple[str, str]]:
    """Field and message of what is wrong with a gate over so many experts."""
    largest = max(numbers_of(gate.top_k))
    if gate.select == "top_k" and largest > num_experts:
        why = " Strategies that add an expert for each task start with one." if num_experts == 1 else ""
        yield "top_k", f"{largest} is more than num_experts = {num_experts}.{why}"
    if gate.select in ("top_p", "entropy") and gate.min_k > num_experts:
        yield "min_k", f"{gate.min_k} is more than num_experts = {num_experts}."
    alone = gate.select == "top_k" and gate.top_k == 1 and num_experts > 1
    if alone and gate.renorm in ("sum", "softmax"):
        text = f"{gate.renorm!r} with top_k: 1 makes every weight 1, so the gate would never learn; use none."
        yield "renorm", text


def _unknown_choices(gate: GateSettings) -> Iterator[tuple[str, str]]:
    for name, allowed in GATE_CHOICES.items():
        value = getattr(gate, name)
        if value is not None and value not in allowed:
            yield name, not_one_of(value, allowed)
    for pattern in gate.top_k if isinstance(gate.top_k, dict) else ():
        if problem := pattern_problem(pattern):
            yield "top_k", problem
    share = gate.share
    if share not in SHARES:
        problem = pattern_problem(share)
        if problem is not None:
            yield "share", problem
        elif re.compile(share).groups != 1:
            text = f"{share!r} is not one of {', '.join(SHARES)}, nor a regular expression with one group, whose match "
            yield "share", f"{text}names the gate.{did_you_mean(share, SHARES)}"


def _numbers(gate: GateSettings) -> Iterator[tuple[str, str]]:
    yield from value_problems(gate, GateSettings)
    if gate.top_p > 1:
        yield "top_p", "must be above 0 and at most 1."
    if gate.threshold is not None and gate.threshold >= 1:
        yield "threshold", "must be at least 0 and below 1; leave it out for 1 / num_experts."
    if gate.entropy_threshold > 1:
        yield "entropy_threshold", "must be above 0 and at most 1: it is a share of the largest entropy."


def _scope(gate: GateSettings) -> Iterator[tuple[str, str]]:
    scope, hard = gate.scope, not gate.learned
    if gate.share == "global" and scope in ("token", "sequence"):
        own = "tokens" if scope == "token" else "sequence"
        text = f"'global' cannot read each layer's own {own}; use linear, group or block, or a gate that "
        yield "share", text + "reads something else: scope task, external, two_pass or constant."
    if hard != (gate.transform == "identity" and gate.select == "hard"):
        text = "identity with select: hard goes with scope: task and score: none, and nothing else does."
        yield "transform", text
    if scope == "external" and gate.feature_dim is None:
        yield "feature_dim", "is needed with scope: external: the width of the features you will give."
    if gate.feature_dim is not None and scope not in ("external", "two_pass"):
        yield "feature_dim", "acts only with scope: external."
    if gate.blend != "none" and (scope != "token" or gate.transform != "softmax"):
        yield "blend", "mixes the probabilities of two gates: it needs scope: token and transform: softmax."
    if gate.splits > 1 and gate.score != "table":
        yield "splits", "needs score: table: every split has weights of its own for a task."


def _score(gate: GateSettings) -> Iterator[tuple[str, str]]:
    scope, score = gate.scope, gate.score
    scores, built_in = SCORES[scope], {name for names in SCORES.values() for name in names}
    reads = "linear" in scores
    if score not in scores and (score in built_in or not reads):
        yield "score", f"must be {' or '.join(map(repr, scores))} with scope: {scope}."
    if gate.bias and score not in ("linear", "mlp", "embedding"):
        yield "bias", f"acts only with score: linear, mlp or embedding, not {score}."


def _noise(gate: GateSettings) -> Iterator[tuple[str, str]]:
    noise = gate.noise
    if noise is not None and not gate.noise_std:
        yield "noise_std", f"of 0 is no noise; leave noise={noise!r} out, or give its strength."
    if noise == "jitter" and gate.scope in ("task", "constant"):
        yield "noise", "'jitter' multiplies what the gate reads; this gate reads nothing."
    if noise == "logistic" and gate.transform != "sigmoid":
        yield "noise", "'logistic' (a relaxed Bernoulli) goes with transform: sigmoid."
    if noise == "gumbel" and gate.transform != "softmax":
        yield "noise", "'gumbel' goes with transform: softmax."
    if not gate.learned and noise is not None:
        yield "noise", "task ids are exact; a task gate with nothing to learn takes no noise."


def _selection(gate: GateSettings) -> Iterator[tuple[str, str]]:
    select, renorm = gate.select, gate.renorm
    if renorm in ("sum", "softmax") and select in ("dense", "hard"):
        yield "renorm", f"{renorm!r} does not act with select: {select}, whose weights already sum to 1."
    if renorm == "sum" and gate.transform == "identity":
        yield "renorm", "'sum' needs weights that are not negative: transform: softmax or sigmoid."
    if renorm == "softmax" and select != "top_k":
        yield "renorm", "'softmax' over the selected scores goes with select: top_k."
    if gate.threshold_learned and gate.scope in ("task", "constant"):
        yield "threshold_learned", "is a function of what the gate reads; this gate reads nothing."
    if gate.transform in UNNORMALISED and select in ("top_p", "threshold"):
        yield "transform", f"select: {select} needs probabilities: transform: softmax or sigmoid."
    if select == "entropy" and gate.transform != "softmax":
        yield "transform", "select: entropy needs probabilities: transform: softmax."
    if gate.balance_rate and select != "top_k":
        yield "balance_rate", "moves which experts top_k selects; it needs select: top_k."

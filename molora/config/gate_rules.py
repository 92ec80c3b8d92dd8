"""What makes sense together in a gate: one set of rules for recipes and for Python, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.config.kinds import GATE_CHOICES, SHARES
from molora.config.suggest import did_you_mean

SCORES = {"token": ("linear", "mlp", "cosine"), "task": ("none",), "constant": ("table",)}
"""The scores that go with each scope."""


def gate_problems(gate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and message of everything wrong with a gate's long fields, by itself."""
    unknown = [*_unknown_choices(gate)]
    yield from unknown
    if unknown:
        return
    yield from _numbers(gate)
    yield from _scope(gate)
    yield from _selection(gate)


def mixture_problems(gate: Mapping[str, Any], num_experts: int) -> Iterator[tuple[str, str]]:
    """Field and message of what is wrong with a gate over so many experts."""
    if gate["select"] == "top_k" and gate["top_k"] > num_experts:
        yield "top_k", f"{gate['top_k']} is more than num_experts = {num_experts}."
    if gate["select"] in ("top_p", "entropy") and gate["min_k"] > num_experts:
        yield "min_k", f"{gate['min_k']} is more than num_experts = {num_experts}."
    alone = gate["select"] == "top_k" and gate["top_k"] == 1 and num_experts > 1
    if alone and gate["renorm"] in ("sum", "softmax"):
        yield (
            "renorm",
            f"{gate['renorm']!r} with top_k: 1 makes every weight 1, so the gate would never learn; use none.",
        )


def _unknown_choices(gate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, allowed in GATE_CHOICES.items():
        value = gate[name]
        if value is not None and value not in allowed:
            yield name, f"{value!r} is not one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
    share = gate["share"]
    if share not in SHARES:
        try:
            groups = re.compile(share).groups
        except re.error as error:
            groups = 0
            yield "share", f"{share!r} is no regular expression: {error}."
        if groups != 1 or share.isidentifier():
            yield (
                "share",
                f"{share!r} is not one of {', '.join(SHARES)}, nor a regular expression with one group, whose "
                f"match names the gate.{did_you_mean(share, SHARES)}",
            )


def _numbers(gate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("top_k", "min_k", "hidden"):
        if gate[name] < 1:
            yield name, "must be at least 1."
    if gate["temperature"] <= 0:
        yield "temperature", "must be positive."
    for name in ("noise_std", "init_std"):
        if gate[name] < 0:
            yield name, "must not be negative."
    if not 0 < gate["top_p"] <= 1:
        yield "top_p", "must be above 0 and at most 1."
    if gate["threshold"] is not None and not 0 <= gate["threshold"] < 1:
        yield "threshold", "must be at least 0 and below 1; leave it out for 1 / num_experts."
    if not 0 < gate["entropy_threshold"] <= 1:
        yield "entropy_threshold", "must be above 0 and at most 1: it is a share of the largest entropy."


def _scope(gate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scope, scores = gate["scope"], SCORES[gate["scope"]]
    if gate["score"] not in scores:
        yield "score", f"must be {' or '.join(map(repr, scores))} with scope: {scope}."
    if gate["share"] == "global" and scope == "token":
        yield (
            "share",
            "'global' cannot read each layer's own tokens; use linear, group or block, or a gate of kind task or constant.",
        )
    if (scope == "task") != (gate["transform"] == "identity" and gate["select"] == "hard"):
        yield (
            "transform",
            "identity with select: hard goes with scope: task, and nothing else does; softmax or sigmoid with the others.",
        )
    if gate["bias"] and gate["score"] not in ("linear", "mlp"):
        yield "bias", f"acts only with score: linear or mlp, not {gate['score']}."
    if gate["noise"] == "jitter" and scope != "token":
        yield "noise", "'jitter' multiplies what the gate reads; it needs scope: token."
    if gate["noise"] == "logistic" and gate["transform"] != "sigmoid":
        yield "noise", "'logistic' (a relaxed Bernoulli) goes with transform: sigmoid."
    if gate["noise"] == "gumbel" and gate["transform"] != "softmax":
        yield "noise", "'gumbel' goes with transform: softmax."
    if scope == "task" and gate["noise"] is not None:
        yield "noise", "task ids are exact; a task gate takes no noise."


def _selection(gate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    select, renorm = gate["select"], gate["renorm"]
    if renorm in ("sum", "softmax") and select in ("dense", "hard"):
        yield "renorm", f"{renorm!r} does not act with select: {select}, whose weights already sum to 1."
    if renorm == "sum" and gate["transform"] == "identity":
        yield "renorm", "'sum' needs weights that are not negative: transform: softmax or sigmoid."
    if renorm == "softmax" and select != "top_k":
        yield "renorm", "'softmax' over the selected scores goes with select: top_k."
    if gate["threshold_learned"] and select != "threshold":
        yield "threshold_learned", "acts only with select: threshold."
    if gate["threshold_learned"] and gate["scope"] != "token":
        yield "threshold_learned", "reads each token; it needs scope: token."
    if select == "entropy" and gate["transform"] != "softmax":
        yield "transform", "select: entropy needs probabilities: transform: softmax."

"""Which auxiliary losses exist, what they take, and which gates they make sense on: one set of rules, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from molora.config.choices import AUX_LOSSES
from molora.config.gate_rules import UNNORMALISED, is_hard_task, sums_to_one
from molora.config.section import Problem
from molora.config.suggest import did_you_mean

WITHOUT_GATE = ("contrastive", "expert_similarity", "orthogonal")
"""Losses of the experts alone."""

BY_TASK = ("localized", "task_label")
"""Losses that go by each task's own experts."""

_OF_PROBABILITIES = ("balance", "importance", "localized", "entropy", "mutual_information", "similarity")
_ONE_ANSWER = {
    "z": "softmax ignores a common shift of its logits",
    "mutual_information": "it gives every token the same weights",
    "similarity": "it gives every sample the same weights",
}


def aux_problems(losses: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with an `aux_losses` mapping by itself."""
    for name, value in losses.items():
        if name not in AUX_LOSSES:
            yield (
                (name,),
                f"not an auxiliary loss.{did_you_mean(name, AUX_LOSSES)} Allowed: {', '.join(AUX_LOSSES)}.",
            )
            continue
        settings = value if isinstance(value, Mapping) else {"coefficient": value}
        if "coefficient" not in settings:
            yield (name,), "needs a coefficient: a number, such as 0.5."
        for key, setting in settings.items():
            yield from _setting_problems(name, key, setting)


def _setting_problems(name: str, key: str, setting: Any) -> Iterator[Problem]:
    options = AUX_LOSSES[name]
    number = (
        isinstance(setting, (int, float)) and not isinstance(setting, bool) and 0 <= setting < float("inf")
    )
    if key == "coefficient":
        if not number:
            yield (name,), f"the coefficient must be a number of at least 0, not {setting!r}."
    elif key not in options:
        allowed = ("coefficient", *options)
        yield (name, key), f"not a setting.{did_you_mean(key, allowed)} Allowed: {', '.join(allowed)}."
    elif isinstance(choices := options[key], tuple):
        if setting not in choices:
            yield (name, key), f"{setting!r} is not one of {', '.join(choices)}."
    elif not number:
        yield (name, key), f"must be a number of at least 0, not {setting!r}."
    elif key == "temperature" and setting == 0:
        yield (name, key), "must be positive: similarities are divided by it."


def fit_problems(
    losses: Mapping[str, Any], gate: Mapping[str, Any], tasks: Mapping[str, Any], num_experts: int
) -> Iterator[Problem]:
    """Losses that this gate would give no meaning or no gradient.

    Args:
        losses: `aux_losses`, each known.
        gate: the gate's long fields.
        tasks: task -> its experts.
        num_experts: how many there are.
    """
    constant = gate["scope"] == "constant"
    for name in losses:
        if name in WITHOUT_GATE:
            continue
        if is_hard_task(gate):
            yield (name,), "needs a gate that learns; a task gate without a score has nothing to learn."
        elif name in _OF_PROBABILITIES and gate["transform"] in UNNORMALISED:
            text = (
                f"is of probabilities, and transform: {gate['transform']} gives none; use softmax or sigmoid."
            )
            yield (name,), text
        elif name in BY_TASK and constant:
            yield (
                (name,),
                "goes by each task's own experts, and a constant gate gives all tasks the same weights.",
            )
        elif name in _ONE_ANSWER and constant:
            yield (name,), f"is meaningless on a constant gate: {_ONE_ANSWER[name]}."
        elif name == "z" and gate["score"] == "table":
            yield (name,), f"is meaningless on a table of logits: {_ONE_ANSWER[name]}."
        elif name == "z" and gate["blend"] != "none":
            yield (
                (name,),
                "is meaningless on blended gates: the logarithms of their probabilities have no size.",
            )
        elif name == "load" and (gate["select"] != "top_k" or gate["noise"] != "gaussian"):
            yield (name,), "is smooth only through the noise: it needs select: top_k and noise: gaussian."
        elif name == "l1" and sums_to_one(gate):
            yield (
                (name,),
                "acts on nothing: these weights sum to 1; it needs transform: identity or no renorm.",
            )
        elif name in BY_TASK and (num_experts == 1 or (tasks and not _differ(tasks, num_experts))):
            yield (name,), "goes by each task's own experts; give `tasks` whose experts differ."


def mixture_fit_problems(losses: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Losses of the experts that this way of combining them leaves nothing to act on.

    Args:
        losses: `aux_losses`, each known.
        settings: combine, share_A and ffn_targets of the adapter.
    """
    if "contrastive" in losses and (settings["combine"] == "factors" or settings["ffn_targets"]):
        what = "combine: factors" if settings["combine"] == "factors" else "ffn_targets"
        yield (
            ("contrastive",),
            f"compares the outputs of experts on single linears; with {what} there are none.",
        )
    if not settings["share_A"]:
        return
    if "orthogonal" in losses:
        yield ("orthogonal",), "keeps A's apart, and with share_A there is one."
    given = losses.get("expert_similarity")
    factor = given.get("factor", "A") if isinstance(given, Mapping) else "A"
    if given is not None and factor != "B":
        yield (
            ("expert_similarity", "factor"),
            f"{factor!r} compares A's, and with share_A there is one; use B.",
        )


def _differ(tasks: Mapping[str, Any], num_experts: int) -> bool:
    return any(len(set(experts)) < num_experts for experts in tasks.values())

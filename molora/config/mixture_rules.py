"""What makes sense together in a whole mixture: gate, combination and experts. For recipes and Python, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molora.config.choices import KINDS
from molora.config.gate_rules import BY_SAMPLE, sums_to_one
from molora.config.section import Problem
from molora.config.suggest import did_you_mean

COMBINES = ("outputs", "factors")


def combination_problems(
    settings: Mapping[str, Any], gate: Mapping[str, Any], names: Sequence[str]
) -> Iterator[Problem]:
    """What is wrong between a gate and how the experts are combined.

    Args:
        settings: combine, always_on, share_A, task_cores, ffn_targets and init of the adapter.
        gate: the gate's long fields.
        names: the experts'.
    """
    combine = settings["combine"]
    if combine not in COMBINES:
        yield (
            ("combine",),
            f"{combine!r} is not one of {', '.join(COMBINES)}.{did_you_mean(combine, COMBINES)}",
        )
    if combine == "factors":
        if gate["scope"] not in BY_SAMPLE:
            yield (
                ("combine",),
                f"'factors' would need a weight matrix per token with gate scope {gate['scope']}; mix outputs, or use "
                f"a gate whose weights are one per sample: scope {', '.join(BY_SAMPLE)}.",
            )
        if settings["ffn_targets"] or settings["share_A"]:
            yield ("combine",), "'factors' goes with neither ffn_targets nor share_A, which mix outputs."
    elif gate["splits"] > 1:
        yield ("gate", "splits"), "acts only with combine: factors."
    yield from _always_on(settings["always_on"], names)
    if settings["ffn_targets"]:
        yield from _feed_forward(gate, settings["always_on"])
    if settings["task_cores"] and not (settings["share_A"] and gate["scope"] == "task"):
        yield (
            ("task_cores",),
            "stand between a shared A and the experts of a task: they need share_A and scope: task.",
        )
    if settings["task_cores"] and settings["ffn_targets"]:
        yield ("task_cores",), "do not go with ffn_targets."
    if settings["share_A"] and settings["init"] == "svd_segments":
        yield ("share_A",), "does not go with init: svd_segments, which gives each expert an A of its own."


def kind_problems(kind: str, given: Mapping[str, Any], mixture: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with a kind of expert, its settings, or the two beside the rest of the mixture.

    Args:
        kind: its name.
        given: `kind_settings`.
        mixture: share_A, task_cores, init and aux_losses of the adapter.
    """
    if kind not in KINDS:
        yield ("kind",), KINDS.unknown(kind)
        return
    if kind == "lora" and not given:  # nothing to refuse, and no need of torch
        return
    found = KINDS[kind]
    for name, value in given.items():
        if name not in found.settings:
            allowed = ", ".join(found.settings) or "none"
            hint = did_you_mean(name, found.settings)
            yield ("kind_settings", name), f"not a setting of kind {kind!r}.{hint} Its settings: {allowed}."
        elif isinstance(value, bool) or not isinstance(value, (int, type(found.settings[name]))):
            wanted = "a whole number" if isinstance(found.settings[name], int) else "a number"
            yield ("kind_settings", name), f"must be {wanted}, not {value!r}."
    yield from found.problems(mixture)


def _always_on(always_on: Mapping[str, Any], names: Sequence[str]) -> Iterator[Problem]:
    for name, weight in always_on.items():
        if name not in names:
            yield (
                ("always_on", name),
                f"unknown expert {name!r}.{did_you_mean(name, names)} Allowed: {', '.join(names)}.",
            )
        number = (
            isinstance(weight, (int, float)) and not isinstance(weight, bool) and abs(weight) < float("inf")
        )
        if weight != "rest" and not number:
            yield ("always_on", name), f"{weight!r} is not a number or 'rest' (1 minus the largest weight)."
    if always_on and set(names) <= set(always_on):
        yield ("always_on",), "leaves the gate no expert to decide over."


def _feed_forward(gate: Mapping[str, Any], always_on: Mapping[str, Any]) -> Iterator[Problem]:
    for name, weight in always_on.items():
        if isinstance(weight, (int, float)) and weight < 0:
            yield (
                ("always_on", name),
                f"{weight} does not go with ffn_targets, whose experts are averaged; it must not be negative.",
            )
    if not sums_to_one(gate):
        yield (
            ("gate", "renorm"),
            "whole feed-forwards are averaged, the frozen one among them, so weights must sum to 1; use renorm: sum, "
            "or select: hard for one expert.",
        )
    if gate["scope"] == "sequence":
        yield (
            ("gate", "scope"),
            "'sequence' does not go with ffn_targets; use token, task, external or two_pass.",
        )

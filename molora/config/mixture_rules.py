"""What makes sense together in a whole mixture: numbers, names, gate and combination. For recipes and Python, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molora.config.choices import KINDS
from molora.config.gate import BY_SAMPLE, GateSettings
from molora.config.gate_rules import size_problems
from molora.config.loss_rules import fit_problems
from molora.config.mixture import Mixture
from molora.config.patterns import pattern_problem
from molora.config.section import Problem
from molora.config.setting import values_of
from molora.config.suggest import options


def mixture_problems(mixture: Mixture, gate: GateSettings) -> Iterator[Problem]:
    """Path and message of everything wrong with a mixture whose parts are fine alone."""
    yield from ((("gate", name), text) for name, text in size_problems(gate, mixture.most_experts))
    yield from _combination(mixture, gate)
    yield from _kind(mixture)
    yield from ((("num_virtual_tokens",), text) for text in _virtual_tokens(mixture, gate))
    yield from ((("aux_losses", *path), text) for path, text in fit_problems(mixture, gate))
    yield from _names(mixture)
    yield from _tasks(mixture)
    if mixture.router is not None and mixture.router.soft and gate.scope != "task":
        yield (
            ("router", "soft"),
            f"acts only under a gate that decides by task id, not of scope {gate.scope}.",
        )


def rank_problems(mixture: Mixture) -> Iterator[Problem]:
    """Ranks and scalings that are given twice."""
    if not isinstance(mixture.r, int) and mixture.rank_pattern:
        yield ("rank_pattern",), "r already gives ranks by layer or pattern; write only one of the two."
    if mixture.use_rslora and mixture.scaling is not None:
        yield ("scaling",), "use_rslora: true already means alpha_over_sqrt_r; write only one of the two."


def _names(mixture: Mixture) -> Iterator[Problem]:
    names, known = mixture.expert_names or [], mixture.experts
    if mixture.expert_names is not None and len(names) != mixture.most_experts:
        yield ("expert_names",), f"names {len(names)} experts, but num_experts = {mixture.most_experts}."
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name.casefold() in seen:  # folders may ignore case
            yield ("expert_names", i), f"{name!r} is there twice (upper and lower case count as one)."
        seen.add(name.casefold())
    for name in mixture.frozen_experts:
        if name not in known:
            yield ("frozen_experts",), _unknown(name, known)


def _tasks(mixture: Mixture) -> Iterator[Problem]:
    for task, chosen in (mixture.tasks or {}).items():
        if not chosen:
            yield ("tasks", task), "names no expert; a task needs at least one."
        for i, name in enumerate(chosen):
            key = i if isinstance(chosen, list) else name
            if name not in mixture.experts:
                yield ("tasks", task, key), _unknown(name, mixture.experts)
            elif isinstance(chosen, list) and name in chosen[:i]:
                yield ("tasks", task, key), f"{name!r} is there twice."


def pattern_problems(mixture: Mixture) -> Iterator[Problem]:
    """Regular expressions on module names that are none, or take too long; entries of a list are suffixes."""
    given: dict[tuple[str, ...], object] = {
        (name,): getattr(mixture, name)
        for name in ("target_modules", "exclude_modules", "plain_targets", "ffn_targets")
    }
    for name in ("num_experts", "r", "rank_pattern", "alpha_pattern"):
        value = getattr(mixture, name)
        given |= {(name, key): key for key in (value if isinstance(value, dict) else ())}
    for path, pattern in given.items():
        if isinstance(pattern, str) and (problem := pattern_problem(pattern)):
            yield path, problem


def _unknown(name: str, known: Sequence[str]) -> str:
    return f"unknown expert {name!r}.{options(name, known)}"


def _combination(mixture: Mixture, gate: GateSettings) -> Iterator[Problem]:
    if mixture.combine == "factors":
        if gate.scope not in BY_SAMPLE:
            text = f"'factors' would need a weight matrix per token with gate scope {gate.scope}; mix outputs, or use "
            yield (
                ("combine",),
                f"{text}a gate whose weights are one per sample: scope {', '.join(BY_SAMPLE)}.",
            )
        if mixture.ffn_targets or mixture.share_A:
            yield ("combine",), "'factors' goes with neither ffn_targets nor share_A, which mix outputs."
    elif gate.splits > 1:
        yield ("gate", "splits"), "acts only with combine: factors."
    yield from _always_on(mixture.always_on, mixture.experts)
    if mixture.ffn_targets:
        yield from _feed_forward(gate, mixture.always_on)
    if mixture.task_cores and not (mixture.share_A and gate.scope == "task"):
        text = "stand between a shared A and the experts of a task: they need share_A and scope: task."
        yield ("task_cores",), text
    if mixture.task_cores and mixture.ffn_targets:
        yield ("task_cores",), "do not go with ffn_targets."
    if mixture.share_A and mixture.init == "svd_segments":
        yield ("share_A",), "does not go with init: svd_segments, which gives each expert an A of its own."


def _virtual_tokens(mixture: Mixture, gate: GateSettings) -> Iterator[str]:
    """Why these experts cannot have virtual tokens, which are weighed once per sample, before the first block."""
    if mixture.num_virtual_tokens is None:
        return
    if gate.scope not in BY_SAMPLE:
        yield (
            f"stand before a whole sample, and a gate of scope {gate.scope} decides by token; use scope "
            f"{', '.join(BY_SAMPLE)}."
        )
    elif not gate.sums_to_one:
        yield "are averaged, so weights must sum to 1; use gate.renorm: sum, or gate.select: dense or hard."
    if gate.splits > 1:
        yield "are not cut into parts: leave gate.splits out."
    if gate.balance_rate:
        yield "have a gate of their own, which gate.balance_rate does not move; use aux_losses: {balance: 0.01}."
    numbers = mixture.num_experts, gate.top_k
    if not all(isinstance(n, int) for n in numbers) or getattr(mixture, "experts_by_layer", None) is not None:
        yield "lie in no layer: give num_experts and gate.top_k as one number each."
    if mixture.router is not None and mixture.router.passes == 1:
        yield "depend on the task, which router.passes: 1 names behind the first blocks; leave router.passes out."


def _kind(mixture: Mixture) -> Iterator[Problem]:
    kind, given = mixture.kind, mixture.kind_settings
    if kind not in KINDS:
        yield ("kind",), KINDS.unknown(kind)
        return
    if kind == "lora" and not given:  # nothing to refuse, and no need of torch
        return
    found = KINDS[kind]
    known = {name: value for name, value in given.items() if name in found.settings}
    if known == given and all(_is_like(value, found.settings[name]) for name, value in given.items()):
        yield from found.problems(values_of(mixture))
        return
    for name, value in given.items():
        if name not in found.settings:
            text = f"not a setting of kind {kind!r}.{options(name, found.settings, 'Its settings')}"
            yield ("kind_settings", name), text
        elif not _is_like(value, found.settings[name]):
            wanted = {int: "a whole number", float: "a number", str: "a name"}[type(found.settings[name])]
            yield ("kind_settings", name), f"must be {wanted}, not {value!r}."


def _is_like(value: Any, default: int | float | str) -> bool:
    """Whether a setting can have this value: one of its default's type, and a whole number for any number."""
    if isinstance(value, bool):
        return False
    return isinstance(value, type(default)) or (isinstance(value, int) and isinstance(default, float))


def _always_on(always_on: Mapping[str, Any], names: Sequence[str]) -> Iterator[Problem]:
    for name, weight in always_on.items():
        if name not in names:
            yield ("always_on", name), _unknown(name, names)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight != "rest" and not (number and abs(weight) < float("inf")):
            yield ("always_on", name), f"{weight!r} is not a number or 'rest' (1 minus the largest weight)."
    if always_on and set(names) <= set(always_on):
        yield ("always_on",), "leaves the gate no expert to decide over."


def _feed_forward(gate: GateSettings, always_on: Mapping[str, Any]) -> Iterator[Problem]:
    for name, weight in always_on.items():
        if isinstance(weight, (int, float)) and weight < 0:
            text = "does not go with ffn_targets, whose experts are averaged; it must not be negative."
            yield ("always_on", name), f"{weight} {text}"
    if not gate.sums_to_one:
        text = "whole feed-forwards are averaged, the frozen one among them, so weights must sum to 1; "
        yield ("gate", "renorm"), text + "use renorm: sum, or select: hard for one expert."
    if gate.scope == "sequence":
        text = "'sequence' does not go with ffn_targets; use token, task, external or two_pass."
        yield ("gate", "scope"), text

"""Which auxiliary losses exist, what they take, and which gates they make sense on: one set of rules, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from molora.config.choices import KINDS
from molora.config.gate import UNNORMALISED, GateSettings
from molora.config.losses import AUX_LOSSES
from molora.config.mixture import Mixture
from molora.config.section import Problem, refuse
from molora.config.suggest import options


def aux_problems(losses: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with an `aux_losses` mapping by itself."""
    for name, value in losses.items():
        if name not in AUX_LOSSES:
            yield (name,), f"not an auxiliary loss.{options(name, AUX_LOSSES)}"
            continue
        settings = value if isinstance(value, Mapping) else {"coefficient": value}
        if "coefficient" not in settings:
            yield (name,), "needs a coefficient: a number, such as 0.5."
        for key, setting in settings.items():
            yield from _setting_problems(name, key, setting)


def _checked(losses: Any) -> Any:
    refuse(aux_problems(losses) if isinstance(losses, dict) else ())
    return losses


AuxLosses = Annotated[dict[str, float | dict[str, Any]], BeforeValidator(_checked)]


def _setting_problems(name: str, key: str, setting: Any) -> Iterator[Problem]:
    known = AUX_LOSSES[name].settings
    number = isinstance(setting, (int, float)) and not isinstance(setting, bool)
    number = number and 0 <= setting < float("inf")
    if key == "coefficient":
        if not number:
            yield (name,), f"the coefficient must be a number of at least 0, not {setting!r}."
    elif key not in known:
        yield (name, key), f"not a setting.{options(key, ('coefficient', *known))}"
    elif isinstance(choices := known[key], tuple):
        if setting not in choices:
            yield (name, key), f"{setting!r} is not one of {', '.join(choices)}."
    elif not number:
        yield (name, key), f"must be a number of at least 0, not {setting!r}."
    elif key == "temperature" and setting == 0:
        yield (name, key), "must be positive: similarities are divided by it."


def fit_problems(mixture: Mixture, gate: GateSettings) -> Iterator[Problem]:
    """Losses, each known, that this gate and this way of combining experts give no meaning or no gradient."""
    for name in mixture.aux_losses:
        fault = _fault(name, mixture, gate) if AUX_LOSSES[name].of_gate else None
        if fault:
            yield (name,), fault
    yield from _expert_problems(mixture)


def _fault(name: str, mixture: Mixture, gate: GateSettings) -> str | None:
    spec, constant = AUX_LOSSES[name], gate.scope == "constant"
    if not gate.learned:
        return "needs a gate that learns; a task gate without a score has nothing to learn."
    if spec.of_probabilities and gate.transform in UNNORMALISED:
        return f"is of probabilities, and transform: {gate.transform} gives none; use softmax or sigmoid."
    if spec.select is not None and gate.select != spec.select:
        return f"is of what select: {spec.select} does; this gate has select: {gate.select}."
    if spec.by_task and constant:
        return "goes by each task's own experts, and a constant gate gives all tasks the same weights."
    if spec.one_answer and constant:
        return f"is meaningless on a constant gate: {spec.one_answer}."
    if name == "z" and gate.score == "table":
        return f"is meaningless on a table of logits: {spec.one_answer}."
    if name == "z" and gate.blend != "none":
        return "is meaningless on blended gates: the logarithms of their probabilities have no size."
    if name == "load" and (gate.select != "top_k" or gate.noise != "gaussian"):
        return "is smooth only through the noise: it needs select: top_k and noise: gaussian."
    if name == "l1" and gate.sums_to_one:
        return "acts on nothing: these weights sum to 1; it needs transform: identity or no renorm."
    tasks, several = mixture.tasks or {}, mixture.most_experts
    differ = not tasks or any(len(set(experts)) < several for experts in tasks.values())
    if spec.by_task and (several == 1 or not differ):
        return "goes by each task's own experts; give `tasks` whose experts differ."
    return None


def _expert_problems(mixture: Mixture) -> Iterator[Problem]:
    losses = mixture.aux_losses
    if "contrastive" in losses and (mixture.combine == "factors" or mixture.ffn_targets):
        what = "combine: factors" if mixture.combine == "factors" else "ffn_targets"
        text = f"compares the outputs of experts on single linears; with {what} there are none."
        yield ("contrastive",), text
    if "orthonormal" in losses and mixture.kind in KINDS and not KINDS[mixture.kind].orthonormal:
        known = ", ".join(name for name in KINDS if KINDS[name].orthonormal)
        text = (
            f"keeps singular vectors orthonormal, and kind: {mixture.kind} has none. Allowed kinds: {known}."
        )
        yield ("orthonormal",), text
    if not mixture.share_A:
        return
    if "orthogonal" in losses:
        yield ("orthogonal",), "keeps A's apart, and with share_A there is one."
    given = losses.get("expert_similarity")
    factor = given.get("factor", "A") if isinstance(given, Mapping) else "A"
    if given is not None and factor != "B":
        text = f"{factor!r} compares A's, and with share_A there is one; use B."
        yield ("expert_similarity", "factor"), text

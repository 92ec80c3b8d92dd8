"""What a report says, in sentences: the result first, then what is wrong and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molora.evaluation.measures import ruled_gates
from molora.evaluation.modes import MODE_TITLES
from molora.evaluation.report import LOWER_IS_BETTER, Report, Score

COLLAPSED_FROM = 0.5  # of the gates ruled by one expert


def headline(report: Report) -> str:
    """What happened, in one sentence."""
    by_mode = {mode: _mean([s for s in report.scores if s.mode == mode]) for mode in report.modes}
    first = next((mode for mode in report.modes if by_mode[mode] is not None), None)
    if first is None:
        losses = [score.value for score in report.scores if score.mode == (report.modes or [""])[0]]
        if not losses:
            return "Nothing was scored: no task has held-out records."
        mean = sum(losses) / len(losses)
        return f"Mean loss over {_tasks(len(losses))}: {mean:.4f} nats per token ({_title(report.modes[0])})."
    count = len(
        {score.task for score in report.scores if score.mode == first and score.metric not in LOWER_IS_BETTER}
    )
    if report.before and (grown := _grown(report, first)):
        return grown
    base = by_mode.get("base")
    beside = f"; the base alone {base:.1f} %" if base is not None and first != "base" else ""
    return f"{by_mode[first]:.1f} % on average over {_tasks(count)} ({_title(first)}){beside}."


def _grown(report: Report, mode: str) -> str | None:
    """Old tasks before and after, and the new one; None where the old ones have no shares in this mode."""
    old = {score.task for score in report.before if score.mode == mode and score.task not in report.added}
    before = _mean([s for s in report.before if s.mode == mode and s.task in old])
    after = _mean([s for s in report.scores if s.mode == mode and s.task in old])
    new = _mean([s for s in report.scores if s.mode == mode and s.task not in old])
    if before is None or after is None:
        return None
    told = "" if new is None else f"; the new task reaches {new:.1f} %"
    return f"The {_tasks(len(old))} from before went from {before:.1f} to {after:.1f} % on average ({_title(mode)}){told}."


def warnings(report: Report) -> list[str]:
    """What is wrong, with the remedy; empty where nothing is."""
    return [*_of_routing(report), *_of_tasks(report), *_of_experts(report), *_of_gate(report)]


def _of_routing(report: Report) -> Iterator[str]:
    routing = report.routing
    if routing is None:
        return
    dead = advice(routing.dead_experts(), mode=routing.mode, grown=bool(report.before))
    if dead:
        yield dead
    if routing.mode == "gate" and len(routing.by_task) > 1 and (found := collapse(routing.gates)):
        yield f"Collapse: {found}"


def collapse(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of gate x expert statistics over several tasks in which one expert rules most gates; else None."""
    ruled, gates = ruled_gates(rows), {row["gate"] for row in rows}
    if not ruled or len(ruled) < COLLAPSED_FROM * len(gates):
        return None
    expert, count = Counter(ruled.values()).most_common(1)[0]
    return (
        f"in {len(ruled)} of {len(gates)} gates one expert is first for at least 90 % of the tokens of all tasks, {expert} in "
        f"{count} of them. Raise adapter.aux_losses.balance, give adapter.aux_losses.task_label where tasks are known, or lower "
        "train.gate_lr."
    )


def _of_tasks(report: Report) -> Iterator[str]:
    for a, b, share in report.naming.alike() if report.naming else ():
        yield (
            f"The router takes {100 * share:.0f} % of the prompts of {a} and {b} for the other one's. If they are one skill, one "
            "expert could serve both: `molora merge-experts` makes it of theirs under a task gate."
        )

    for a, b, first, second in report.counterfactuals.one_skill() if report.counterfactuals else ():
        yield (
            f"{a} and {b} look like one skill: {first} and {second} each do both as well alone. One expert could serve both: "
            "`molora merge-experts` makes it of theirs under a task gate."
        )


def _of_experts(report: Report) -> Iterator[str]:
    for a, b in report.similarity.alike() if report.similarity else ():
        yield (
            f"{a} and {b} do nearly the same (cosine of what they add "
            f"{report.similarity.cosine[a][b]:.2f}): one of them would do, or adapter.aux_losses.expert_similarity keeps "  # type: ignore[union-attr]
            "them apart in training."
        )


def _of_gate(report: Report) -> Iterator[str]:
    found = report.counterfactuals
    gain = found.gain() if found else None
    if gain is not None and gain <= 0 and found is not None and found.mode == "gate":
        yield (
            f"The gate does not earn its keep: even weights score {100 * -gain:.1f} points better on average. "
            "adapter.gate: {kind: soft} or one LoRA costs less."
            if gain < 0
            else "The gate does not earn its keep: even weights score the same. One LoRA of as many ranks costs less."
        )


def advice(dead: Sequence[str], *, mode: str, grown: bool = False) -> str | None:
    """One sentence on what to do about dead experts, or None when there are none; grown: an expert was just added."""
    if not dead:
        return None
    names = ", ".join(dead)
    if mode == "task":
        return f"No evaluated task uses: {names}. Map a task to it, or `remove_expert` to save the memory."
    if grown:
        return f"Hardly used: {names}. An expert that was just added needs more steps, or a higher train.lr."
    remedy = "Raise adapter.aux_losses.balance, add adapter.gate.noise, or train with fewer experts."
    return f"Hardly used: {names}. {remedy}"


def _mean(scores: Sequence[Score]) -> float | None:
    """In percent, over those that are shares."""
    shares = [score.value for score in scores if score.metric not in LOWER_IS_BETTER]
    return 100 * sum(shares) / len(shares) if shares else None


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _title(mode: str) -> str:
    return MODE_TITLES.get(mode, mode)

"""What if: each task's score with one expert alone, with one left out, and with even weights instead of the gate's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.evaluation.attribution import MOST, coalitions, shapley
from molora.evaluation.metrics import overall
from molora.evaluation.modes import in_mode
from molora.evaluation.score import HeldOut, Limits
from molora.progress import phase
from molora.tuner.api import routing

AS_IT_IS, EVEN, BASE = "as it is", "even weights", "no expert"


@dataclass(frozen=True)
class Counterfactuals:
    """Scores of each task under each change; a loss is lower where it is better.

    mode: who decided where nothing was changed. records: how many of a task were scored at most.
    alone, without: task -> expert -> score with that expert alone, and without it, as if it had never been added.
    changed: task -> `as it is`, `even weights`, `no expert` -> score.
    shapley: task -> expert -> how much of the score it accounts for, empty where that was not asked for.
    """

    mode: str
    records: int
    metrics: dict[str, str]
    changed: dict[str, dict[str, float]]
    alone: dict[str, dict[str, float]]
    without: dict[str, dict[str, float]]
    shapley: dict[str, dict[str, float]] = field(default_factory=dict)

    def gain(self) -> float | None:
        """How much better the gate is than even weights, averaged over the tasks whose metric is a share."""
        pairs = [row for task, row in self.changed.items() if self.metrics[task] != "loss"]
        return sum(row[AS_IT_IS] - row[EVEN] for row in pairs) / len(pairs) if pairs else None

    def one_skill(self, within: float = 0.02) -> list[tuple[str, str, str, str]]:
        """Pairs of tasks, and the expert that is best alone at each, where either expert does the other's task as well.

        As well: it scores at most `within` less. Both experts are better than none by more than that.
        """
        rows = {task: row for task, row in self.alone.items() if row and self.metrics[task] != "loss"}
        best = {task: max(row, key=row.__getitem__) for task, row in rows.items()}
        learned = [t for t in rows if rows[t][best[t]] > self.changed[t][BASE] + within]
        return [
            (a, b, best[a], best[b])
            for a, b in combinations(learned, 2)
            if best[a] != best[b]
            and rows[a][best[b]] >= rows[a][best[a]] - within
            and rows[b][best[a]] >= rows[b][best[b]] - within
        ]


def counterfactuals(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    mode: str,
    limits: Limits | None = None,
    records: int = 50,
    attribute: bool = False,
) -> Counterfactuals:
    """Score the first `records` held-out records of each task under every change: 3 + 2 · experts scores for a task.

    Args:
        mode: `gate` or `task`, see `runner.evaluate_tasks`.
        attribute: also with every subset of the experts, 2^experts scores more, for their Shapley values.

    Raises ConfigError where there are too many experts to attribute.
    """
    limits = limits or Limits()
    experts: tuple[str, ...] = tuple(model.expert_names)
    if attribute and len(experts) > MOST:
        raise ConfigError(
            f"Shapley values need a score of every subset of the experts: at most {MOST} experts, not {len(experts)}.",
            hint="leave --shapley out: --what-if alone scores each expert alone and left out.",
        )
    subsets = [*coalitions(experts)][1:-1] if attribute else []
    changed, alone, without = (
        dict[str, dict[str, float]](),
        dict[str, dict[str, float]](),
        dict[str, dict[str, float]](),
    )
    each = [min(records, len(task.eval)) for task in tasks]
    shares = dict[str, dict[str, float]]()
    with phase("what if", sum(each) * (3 + 2 * len(experts) + len(subsets)), "records") as shown:
        for task, count in zip(tasks, each, strict=True):
            held_out = HeldOut(model, tokenizer, task, limits)
            score = partial(_score, held_out, range(count))
            as_usual = partial(in_mode, model, task.name, mode)
            shown.now(f"{task.name}, the gate's weights changed")
            changed[task.name] = {
                AS_IT_IS: score(as_usual()),
                EVEN: score(routing(model, task_ids=task.name, experts=experts)),
                BASE: score(in_mode(model, task.name, "base")),
            }
            shown.now(f"{task.name}, each expert alone")
            alone[task.name] = {e: score(routing(model, task_ids=task.name, experts=[e])) for e in experts}
            shown.now(f"{task.name}, each expert left out")
            without[task.name] = {}
            for expert in experts:
                with routing(model, without=[expert]):
                    without[task.name][expert] = score(as_usual())
            if attribute:
                shown.now(f"{task.name}, every subset of the experts")
                value = {
                    frozenset[str](): changed[task.name][BASE],
                    frozenset(experts): changed[task.name][AS_IT_IS],
                }
                for subset in subsets:
                    with routing(model, without=[name for name in experts if name not in subset]):
                        value[subset] = score(as_usual())
                shares[task.name] = shapley(value, experts)
    metrics = {task.name: task.metric for task in tasks}
    return Counterfactuals(mode, records, metrics, changed, alone, without, shares)


def _score(held_out: HeldOut, records: Sequence[int], context: AbstractContextManager[Any]) -> float:
    with context:
        answers = held_out.ask(records)
    results = [held_out.result(record, answer) for record, answer in sorted(answers.items())]
    return overall(held_out.task.metric, results)


def rows(found: Counterfactuals) -> Mapping[str, Mapping[str, float]]:
    """Task -> change -> score, for a table: `as it is`, `even weights`, `no expert`, `only e`, `without e`."""
    return {
        task: {
            **found.changed[task],
            **{f"only {name}": value for name, value in found.alone[task].items()},
            **{f"without {name}": value for name, value in found.without[task].items()},
        }
        for task in found.changed
    }

"""How often an adapter's task router names the task of held-out prompts right, and what it takes the others for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.prompts import encode
from molora.data.tasks import Task
from molora.evaluation.score import Limits
from molora.models.task_router import features, router_of
from molora.tuner.api import find_context

NAMED = "held-out prompts that the router names right"
REFUSED = "would be told from the other tasks' prompts if their own were not known"
NOTHING = "nothing known"


@dataclass(frozen=True)
class Naming:
    """What held-out prompts are taken for.

    `named`: task -> {name: how many of its prompts}, `nothing known` among the names where the router refuses prompts.
    `refused`: task -> share of its prompts that the router, did it not know this task, would say belong to no other one.
    """

    named: dict[str, dict[str, int]]
    refused: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What prompts are taken for, in the order of the tasks."""
        found = {name for counts in self.named.values() for name in counts}
        return [name for name in (*self.named, NOTHING) if name in found or name in self.named] + sorted(
            found - {*self.named, NOTHING}
        )

    def alike(self, above: float = 0.1) -> list[tuple[str, str, float]]:
        """Pairs of tasks whose prompts are taken for each other, and the share of all their prompts; the most alike first."""
        sizes = {task: sum(counts.values()) for task, counts in self.named.items()}
        found = [
            (a, b, (self.named[a].get(b, 0) + self.named[b].get(a, 0)) / (sizes[a] + sizes[b]))
            for a, b in combinations((task for task in self.named if sizes[task]), 2)
        ]
        return sorted((pair for pair in found if pair[2] > above), key=lambda pair: -pair[2])

    def facts(self) -> dict[str, str]:
        """For people: `shout 200 of 200, loud 198 of 200 (2 as shout)`, and the shares that would be refused."""
        parts = []
        for task, counts in self.named.items():
            others = ", ".join(f"{count} as {name}" for name, count in counts.items() if name != task)
            right, total = counts.get(task, 0), sum(counts.values())
            parts.append(f"{task} {right} of {total}" + (f" ({others})" if others else ""))
        told = ", ".join(f"{task} {100 * share:.0f} %" for task, share in self.refused.items())
        return {NAMED: ", ".join(parts)} | ({REFUSED: told} if told else {})


def naming(model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task], limits: Limits) -> Naming:
    """What the active adapter's router takes the held-out prompts of these tasks for."""
    adapter = str(model.active_adapter)
    router, task_map = router_of(model, adapter), find_context(model).adapters[adapter].task_map
    named, refused = {}, {}
    for task in tasks:
        prompts = [list(encode(task, record, tokenizer, limits.max_length).prompt) for record in task.eval]
        read = features(model, tokenizer, prompts, adapter, limits.batch_size)
        found = router.named(router.guess(read))
        names = [NOTHING if i is None else task_map.name(i) for i in found]
        named[task.name] = dict(Counter(names).most_common())
        share = router.strangers(task_map.ids.get(task.name), read)  # None: a task that is still to come
        if share is not None:
            refused[task.name] = share
    return Naming(named, refused)

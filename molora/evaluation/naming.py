"""How often an adapter's task router names the task of held-out prompts right, and what it takes the others for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.prompts import encode
from molora.data.tasks import Task
from molora.evaluation.score import Limits
from molora.models.task_router import named_prompts

NAMED = "held-out prompts that the router names right"


def named_right(model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task], limits: Limits) -> str:
    """For people: `shout 200 of 200, loud 198 of 200 (2 as shout)`; `nothing known` are prompts it refuses to name."""
    parts = []
    for task in tasks:
        prompts = [list(encode(task, record, tokenizer, limits.max_length).prompt) for record in task.eval]
        named = named_prompts(model, tokenizer, prompts, batch_size=limits.batch_size)
        found = Counter(row.task or "nothing known" for row in named)
        others = ", ".join(f"{count} as {name}" for name, count in found.most_common() if name != task.name)
        parts.append(f"{task.name} {found[task.name]} of {len(prompts)}" + (f" ({others})" if others else ""))
    return ", ".join(parts)

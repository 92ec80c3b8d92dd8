"""At the end of training: the adapter's task router learns which prompts belong to the tasks that were trained."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.module import MoLoraDataModule
from molora.models.task_router import drawn, learn_prompts, router_of
from molora.tuner.api import find_context


def teach_router(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: MoLoraDataModule, batch_size: int, seed: int
) -> bool:
    """Teach it the tasks of the data that it has not learned yet, from their training prompts; whether there were any.

    Nothing happens where the adapter has no router.
    """
    adapter = str(model.active_adapter)
    found = find_context(model).adapters[adapter]
    if found.router is None:
        return False
    learned, most = router_of(model, adapter).learned, found.router.settings.records
    prompts = {
        task.name: drawn([example.prompt for example in data.examples(task.name, "train")], most, seed)
        for task in data.tasks
        if found.task_map.ids[task.name] not in learned
    }
    if prompts:
        learn_prompts(model, tokenizer, prompts, adapter, batch_size)
    return bool(prompts)

"""`molora validate`: numbered checks of a recipe, cheapest first; nothing is trained and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from molora.config import load_recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from molora.config import RunConfig
    from molora.data.preview import Preview
    from molora.data.tasks import TaskSet

RECORDS = 3


def run(recipe: Path, overrides: Sequence[str], *, schema_only: bool = False) -> None:
    """Check the schema, the data, the tokenizer, the targets and the parameters, in this order."""
    console = Console(soft_wrap=True, highlight=False)
    config = load_recipe(recipe, overrides)
    console.print(f"1 schema      ok: {recipe}")
    if schema_only:
        return

    from molora.data.tasks import TaskSet

    tasks = TaskSet.from_config(config.data, task_type=config.base.task_type)
    sizes = ", ".join(f"{task.name} {len(task.train)}+{len(task.eval)}" for task in tasks)
    console.print(f"2 data        ok: {len(tasks.ids)} tasks, train+eval records: {sizes}")
    _check_model(console, config, tasks)


def _check_model(console: Console, config: RunConfig, tasks: TaskSet) -> None:
    from molora.errors import ConfigError
    from molora.training.build import build_skeleton, load_tokenizer
    from molora.training.environment import quiet_libraries

    try:
        with quiet_libraries():
            tokenizer = load_tokenizer(config.base)
    except ConfigError as error:
        console.print(f"3 tokenizer   skipped, and all that needs the base: {error.message}")
        return
    console.print(
        f"3 tokenizer   ok: {len(tokenizer)} tokens, eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}, "
        f"chat template {'yes' if tokenizer.chat_template else 'no'}"
    )
    _show_records(console, config, tasks, tokenizer)
    with quiet_libraries():
        model = build_skeleton(config, tasks.ids, tasks.num_labels or None)
    console.print(f"5 targets     ok: {len(model.base_model.targeted_module_names)} layers")
    _show_parameters(console, model)


def _show_records(console: Console, config: RunConfig, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase) -> None:
    from molora.data.preview import preview

    console.print(f"4 records     the first {RECORDS} of each task; the loss reads what is bold, not what is dim")
    for task in tasks:
        for item in preview(task, tokenizer, RECORDS, max_length=config.data.max_length):
            console.print(_record(task.name, item))


def _record(task: str, item: Preview) -> Text:
    """One record on one line: masked prompt dim, learned target bold, control characters visible."""
    line = Text(f"  {task}: ")
    line.append(_visible(item.prompt), style="dim")
    line.append(" → ")
    line.append(_visible(item.target), style="bold")
    learned = sum(token.learned for token in item.tokens)
    line.append(f"   [{len(item.tokens) - learned} masked, {learned} learned tokens]")
    if item.cut_prompt or item.cut_target:
        line.append(f" cut: {item.cut_prompt} of the prompt, {item.cut_target} of the target", style="yellow")
    return line


def _visible(text: str) -> str:
    return text.replace("\n", "⏎")


def _show_parameters(console: Console, model: PeftModel) -> None:
    from molora.training.optimizer import parameters_by_role

    roles = parameters_by_role(model)
    counts = ", ".join(f"{role} {sum(p.numel() for p in group):,}" for role, group in roles.items() if group)
    console.print(f"6 parameters  trainable: {counts}")

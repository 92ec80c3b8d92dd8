"""`molora validate`: numbered checks of a recipe, cheapest first; nothing is trained and nothing is written."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.text import Text
from typer import Option

from molora.cli.options import Overrides, RecipeFile
from molora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from molora.config import DataConfig, RunConfig
    from molora.continual.turns import TurnsRun
    from molora.data.preview import Preview
    from molora.data.tasks import TaskSet

RECORDS = 3
_READS = "the loss reads what is bold, not what is dim"


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    schema_only: Annotated[bool, Option("--schema-only", help="Stop after checking the YAML.")] = False,
    run: Annotated[
        Path | None, Option(help="Check a recipe for add-expert together with the run it is for.")
    ] = None,
    time: Annotated[
        bool, Option("--time", help="Load the base, run a few steps, and say how long training takes.")
    ] = False,
) -> None:
    """Check a recipe, its data and its base without training.

    Example: molora validate recipes/quickstart.yaml
    """
    from molora.config import DataConfig, load_grow, load_recipe
    from molora.config.grow import is_grow
    from molora.config.reach import data_reach, reach

    console = Console(soft_wrap=True, highlight=False)
    config: RunConfig | None = None
    if is_grow(recipe) and run is not None:
        config = _grown(recipe, overrides or [], run)
        data = config.data
    elif is_grow(recipe):  # it has no base of its own: its schema and its task are checked
        grow = load_grow(recipe, overrides or [])
        data = DataConfig(tasks={grow.task.name: grow.task.as_task()})
    else:
        config = load_recipe(recipe, overrides or [])
        data = config.data
    console.print(f"1 schema      ok: {recipe}", markup=False)
    for line in data_reach(data) if config is None else reach(config):
        console.print(f"  outside the working folder: {line}", markup=False)
    if not schema_only:
        _check_data(console, data, config, time)


def _grown(recipe: Path, overrides: list[str], run: Path) -> RunConfig:
    """The recipe of the run that add-expert would make."""
    from molora.config import load_grow
    from molora.continual.grow import grown_config
    from molora.store.adapter import read_config
    from molora.store.runs import Run

    parent = Run.find(run)
    grow = load_grow(recipe, overrides, run=parent.config)
    return grown_config(parent.config, grow, read_config(parent.trained_adapter), parent.path)


def _check_data(console: Console, data: DataConfig, config: RunConfig | None, time: bool) -> None:
    from molora.data.audit import audit
    from molora.data.tasks import TaskSet

    tasks = TaskSet.from_config(data, task_type=config.base.task_type if config else None)
    tasks = tasks.joined() if config and config.base.head == "match" else tasks
    if config is not None and (kind := _in_turns(config)) is not None:
        kind.check(config, tasks)
    sizes = ", ".join(f"{task.name} {len(task.train)}+{len(task.eval)}" for task in tasks)
    console.print(f"2 data        ok: {len(tasks.ids)} tasks, train+eval records: {sizes}", markup=False)
    for task in tasks:
        for line in audit(task).lines():
            console.print(f"  {task.name}: {line}", markup=False)
    if config is not None and config.federated is not None:
        from molora.federated.partition import split

        parts = split(tasks, config.federated, config.seed)
        held = sorted(sum(len(task.train) for task in part) for part in parts)
        console.print(f"  {len(parts)} clients with {held[0]} to {held[-1]} training records each")
    if config is None:
        console.print(
            "3 base        skipped: it comes from the run that the expert is added to; --run names it"
        )
        _show_texts(console, tasks)
    else:
        _check_model(console, config, tasks, time)


def _in_turns(config: RunConfig) -> type[TurnsRun] | None:
    """The kind of run that learns one thing after another, where the recipe is of one."""
    if config.continual is not None:
        from molora.continual.sequence import SequenceRun

        return SequenceRun
    if config.stages is not None:
        from molora.continual.stages import StagedRun

        return StagedRun
    return None


def _check_model(console: Console, config: RunConfig, tasks: TaskSet, time: bool) -> None:
    from molora.evaluation.pass_at_k import check_judges
    from molora.models.base import load_tokenizer
    from molora.models.base_check import check_base, check_lengths
    from molora.models.build import build_skeleton, labels_of_tasks
    from molora.training.environment import quiet_libraries
    from molora.training.forecast import at_largest, first_encoded, length_lines, memory_line, time_line
    from molora.training.steps import batches_of, notes_on_length
    from molora.training.train import check_machine, check_validation
    from molora.tuner.router import where_it_reads

    try:
        with quiet_libraries():
            tokenizer = load_tokenizer(config.base)
    except ConfigError as error:
        console.print(f"3 tokenizer   skipped, and all that needs the base: {error.message}", markup=False)
        _show_texts(console, tasks)
        return
    console.print(
        f"3 tokenizer   ok: {len(tokenizer)} tokens, eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}, "
        f"chat template {'yes' if tokenizer.chat_template else 'no'}",
        markup=False,
    )
    _show_records(console, config, tasks, tokenizer)
    kind, labels = _in_turns(config), labels_of_tasks(config.base, tasks)
    first, ids, learned, turns = config, tasks.ids, tasks, list[int]()
    if kind is not None:
        from molora.continual.turns import steps_of_turns

        first, ids = kind.recipe_of(config, tasks.ids, 0)
        learned = tasks.only(kind.tasks_of_turns(config)[0])
        turns = steps_of_turns(kind, config, tasks)
    if config.federated is not None:
        steps = config.federated.rounds * config.federated.asked * config.federated.local_steps
        train = config.train.model_copy(update={"max_steps": steps, "epochs": None})
        first = config.model_copy(update={"train": train})
    with quiet_libraries():
        model = build_skeleton(at_largest(first), ids, labels)
    check_base(config, model, tokenizer)
    check_machine(config)
    check_judges(config, tasks)
    check_validation(config, [task for task in tasks if len(task.eval)])
    examples, summary = first_encoded(config, tasks, tokenizer)
    check_lengths(config, model, summary)
    lengths, *cut = length_lines(config, model, examples, summary)
    console.print(f"5 lengths     {lengths}", markup=False)
    for line in cut:
        console.print(f"  {line}", markup=False)
    tuner: Any = model.base_model
    reads = where_it_reads(tuner.model, tuner.context, model.active_adapter)
    router = f"; the router reads {reads}" if reads is not None else ""
    console.print(f"6 targets     ok: {len(tuner.targeted_module_names)} layers{router}")
    growth = config.train.rank_growth
    _show_parameters(console, model, "" if growth is None else f" (at rank {growth.max}, where growth ends)")
    examples = {name: found for name, found in examples.items() if name in learned.ids}
    console.print(f"8 memory      {memory_line(first, model, labels, examples, tokenizer)}", markup=False)
    for note in notes_on_length(first, batches_of(learned, first.train.batch_size)):
        console.print(f"9 steps       {note}", markup=False)
    if time:
        console.print(f"  {time_line(first, ids, labels, learned, turns)}", markup=False)


def _show_texts(console: Console, tasks: TaskSet) -> None:
    """Records as text, where there is no tokenizer to show them as the model gets them."""
    from molora.data.render import render

    console.print(f"4 records     the first {RECORDS} of each task as text; {_READS}")
    for task in tasks:
        for record in islice(task.train, RECORDS):
            console.print(_line(task.name, *render(task, record)))


def _show_records(
    console: Console, config: RunConfig, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase
) -> None:
    from molora.data.preview import preview

    console.print(f"4 records     the first {RECORDS} of each task; {_READS}")
    for task in tasks:
        for item in preview(task, tokenizer, RECORDS, max_length=config.data.max_length):
            console.print(_record(task.name, item))


def _record(task: str, item: Preview) -> Text:
    """One record on one line: masked prompt dim, learned target bold, control characters visible."""
    line = _line(task, item.prompt, item.target)
    learned = sum(token.learned for token in item.tokens)
    line.append(f"   [{len(item.tokens) - learned} masked, {learned} learned tokens]")
    if item.cut_prompt or item.cut_target:
        line.append(f" cut: {item.cut_prompt} of the prompt, {item.cut_target} of the target", style="yellow")
    return line


def _line(task: str, prompt: str, target: str) -> Text:
    from molora.report.tables import visible

    return Text.assemble(f"  {task}: ", (visible(prompt), "dim"), " → ", (visible(target), "bold"))


def _show_parameters(console: Console, model: PeftModel, when: str) -> None:
    from molora.training.optimizer import parameters_by_role

    roles = parameters_by_role(model)
    counts = ", ".join(f"{role} {sum(p.numel() for p in group):,}" for role, group in roles.items() if group)
    console.print(f"7 parameters  trainable: {counts}{when}")

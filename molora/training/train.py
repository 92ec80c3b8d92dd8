"""train: from a recipe to a finished run folder, resumable at any moment."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig, load_recipe
from molora.config.choices import KINDS
from molora.config.load import Recipe, recipe_text
from molora.config.objective import OBJECTIVES
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.disk.atomic import check_target, write_file, write_json
from molora.errors import ConfigError
from molora.evaluation.pass_at_k import check_judges
from molora.models.base_check import check_base, check_lengths
from molora.models.build import build_model, labels_of_tasks, load_trained, tasks_of
from molora.models.features import CLUSTERS_FILE, fit_features, load_features
from molora.progress import phase
from molora.report.plots import LOSSES, plot_loss
from molora.store.adapter import save
from molora.store.runs import CONFIG_FILE, ENVIRONMENT_FILE, FORMAT, Run, checkpoint_step
from molora.training.callbacks import Interrupt, Steps
from molora.training.checkpoint import Checkpoints, delete_old
from molora.training.environment import at_work, describe_environment, is_first_process, prepare_process
from molora.training.evaluate import evaluate_run
from molora.training.loggers import MetricsCsv, Terminal
from molora.training.objective import Companion
from molora.training.optimise import check_device, optimise
from molora.training.resume import find_run, say_where
from molora.training.rollback import with_rollback
from molora.training.steps import notes_on_length, total_steps
from molora.training.teach_router import teach_router
from molora.training.trackers import build_trackers, check_loggers

log = logging.getLogger(__name__)

Conclude = Callable[[Run, PeftModel], None]


def train(
    recipe: Recipe, overrides: Sequence[str] = (), resume: bool | str | os.PathLike[str] | None = None
) -> Run:
    """Train a mixture as a recipe says, evaluate it, and return its run folder.

    Args:
        recipe: path of a YAML file, the same as a mapping, or a RunConfig.
        overrides: `section.key=value` texts applied on top.
        resume: True continues the recipe's latest run, a path the run in that folder. A resumed run ends
            with the very weights it would have had uninterrupted (one device, float32, same machine).

    Raises:
        ConfigError, DataError: the recipe or the data cannot be used; nothing was written.
        DivergedError: the loss is not finite; checkpoints are intact.
        InterruptedRun: a signal came; a checkpoint was saved.
    """
    config = load_recipe(recipe, overrides)
    if config.continual is not None:
        raise ConfigError(
            "the recipe trains on tasks one after another.",
            hint="molora continual RECIPE (in Python: molora.train_sequence), or take out its `continual` section.",
        )
    if config.federated is not None:
        raise ConfigError(
            "the recipe trains in federated rounds.",
            hint="molora federate RECIPE (in Python: molora.federate), or take out its `federated` section.",
        )
    if config.stages is not None:
        raise ConfigError(
            "the recipe has stages.", hint="molora train RECIPE, or in Python molora.train_stages."
        )
    config, tasks = opened(config)
    prepare_process(config.seed)
    with at_work():
        run = find_run(config, resume)
        model, tokenizer = build_model(config, tasks.ids, labels_of_tasks(config.base, tasks))
        check_base(config, model, tokenizer)
        return fit(config, model, tokenizer, tasks, run)


def opened(config: RunConfig) -> tuple[RunConfig, TaskSet]:
    """What every training begins with: the recipe with the labels of its data, and its tasks.

    Raises ConfigError where this machine cannot train it or write its runs, DataError where its data cannot be read.
    """
    check_machine(config)
    tasks = tasks_of(config)
    return with_labels(config, tasks), tasks


def fit(
    config: RunConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskSet,
    run: Run | None = None,
    conclude: Conclude | None = None,
    companion: Companion | None = None,
) -> Run:
    """Train a model that is already built, in a new run folder or going on in `run`.

    All data are read and encoded before the folder is made, so bad data leave nothing behind. `conclude`
    scores the trained model, in the first process, once the adapter is saved; by default every task is evaluated.
    `companion`: see MoLoraModule.
    """
    settings = config.train
    data = encoded(config, tasks, tokenizer)
    check_lengths(config, model, data.summary())
    clusters = None
    if run is None:
        clusters = fit_features(config, model, data, tokenizer)
    else:  # what a resumed run reads stays what it was
        load_features(config, run.path, model, tokenizer)
    batches = len(data.train_dataloader())
    steps = total_steps(settings, batches)
    for note in notes_on_length(config, batches):
        log.warning(note)
    validation = _validation(config, data)
    say_where(run, steps)
    first = is_first_process()  # Lightning has not set up the others yet
    if run is None and first:
        run = start_run(config)
        if clusters is not None:
            clusters.save(run.path / CLUSTERS_FILE)
    # Other processes of a distributed run learn the folder from the first one, see Checkpoints.setup.
    folder = run.path if run is not None else Path(config.output)
    with run.lock() if run is not None and first else nullcontext():
        if run is not None and first:
            check_target(run.adapter)  # a resumed run replaces it in the end
            write_config(run, config)
            # A killed run may not have come to it.
            step = checkpoint_step(run.latest_checkpoint)
            delete_old(run.path / "checkpoints", step, settings.keep_checkpoints)

        def attempt() -> Trainer:
            checkpoint = run.latest_checkpoint if run is not None else None
            every, rollback = settings.save_every or steps, settings.on_nonfinite == "rollback"
            writer = Checkpoints(folder / "checkpoints", every, settings.keep_checkpoints, first=rollback)
            done = checkpoint_step(checkpoint)
            kept = MetricsCsv(folder / "metrics.csv", done)
            with phase("training", steps, "steps", done=done) as shown:
                return optimise(
                    model,
                    data,
                    settings,
                    companion=companion,
                    validation=validation,
                    callbacks=[Steps(shown), writer, Interrupt(writer)],
                    loggers=[Terminal(shown), kept, *build_trackers(config, folder)],
                    checkpoint=checkpoint,
                )

        trainer = attempt() if settings.on_nonfinite == "stop" else with_rollback(attempt, data)
        run = Run(Path(trainer.strategy.broadcast(str(folder))))
        if trainer.is_global_zero:
            if settings.strategy == "fsdp2":
                # A sharded one answers only where all processes ask together.
                save(model, run.adapter)
                model, _, _ = load_trained(run.path)
            model = model.to(trainer.strategy.root_device).eval()
            taught = teach_router(model, tokenizer, data, config.eval.batch_size, config.seed)
            if taught or settings.strategy != "fsdp2":
                save(model, run.adapter)
            if conclude is not None:
                conclude(run, model)
            else:
                plot_loss(run.path / "metrics.csv", run.path / "loss.png", LOSSES)
                evaluate_run(run, model, tokenizer, tasks)
    return run


def encoded(config: RunConfig, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase) -> MoLoraDataModule:
    """The tasks' records, read and encoded, in the batches that the objective takes."""
    objective = OBJECTIVES[config.train.objective.kind]
    objective.check_tasks([*tasks])
    check_judges(config, tasks)
    collate, size = objective.collate, config.train.batch_size
    halves = bool(KINDS[config.adapter.kind].upper)
    if halves and config.train.accumulate > 1:
        raise ConfigError(
            f"kind {config.adapter.kind} takes each step on one half of the data, so train.accumulate must be 1.",
            hint="raise train.batch_size instead.",
        )
    data = MoLoraDataModule(config.data, tasks, tokenizer, size, config.seed, collate=collate, halves=halves)
    data.setup("fit")
    return data


def start_run(config: RunConfig) -> Run:
    """A new run folder with the environment and, last, the resolved recipe that makes it a run."""
    run = Run.create(config.output, config.name)
    write_json(run.path / ENVIRONMENT_FILE, {"format": FORMAT, **describe_environment()})
    write_config(run, config)
    return run


def write_config(run: Run, config: RunConfig) -> None:
    """Write the resolved recipe atomically; a resumed run may have been given more steps."""
    write_file(run.path / CONFIG_FILE, recipe_text(config).encode())


def check_machine(config: RunConfig) -> None:
    """Raise ConfigError where this machine cannot train a recipe, lacks its loggers, or cannot write its runs."""
    check_device(config.train)
    check_loggers(config.train)
    check_output(Path(config.output))


def check_output(output: Path) -> None:
    """Raise ConfigError, before a model is loaded, where run folders cannot be made; writes nothing."""
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"output: {existing} {what}.", hint="choose another output folder.")


def _validation(config: RunConfig, data: MoLoraDataModule) -> Iterable[Any] | None:
    """The held-out batches to validate on, or None where the recipe does not."""
    if config.train.val_every is None:
        return None
    batches = data.val_dataloader()
    check_validation(config, batches)
    return batches


def check_validation(config: RunConfig, held_out: Sized) -> None:
    """Raise ConfigError where a recipe validates on nothing."""
    if config.train.val_every is not None and not len(held_out):
        raise ConfigError(
            "train.val_every is set, but no task has held-out records to validate on.",
            hint="give a task eval data, or set train.val_every to null.",
        )


def with_labels(config: RunConfig, tasks: TaskSet) -> RunConfig:
    """The recipe with the labels its data declared, so that a run knows the size of its head without them."""
    resolved = {
        task.name: config.data.tasks[task.name].model_copy(update={"labels": list(task.labels)})
        for task in tasks
        if task.labels
    }
    data = config.data.model_copy(update={"tasks": {**config.data.tasks, **resolved}})
    return config.model_copy(update={"data": data})

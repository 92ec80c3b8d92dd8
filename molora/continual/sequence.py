"""The sequence runner: each task in turn is trained, then every task is scored; resumable between and inside turns.

A sequence is a run folder with one run folder per turn in `stages/`. A turn reads what it needs of earlier ones from
their folders, and is complete once its `row.json` is there, which is written last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig, load_recipe
from molora.config.grow import NewExpert
from molora.config.load import Recipe
from molora.continual.memory import Memory
from molora.continual.registry import build_strategy
from molora.continual.scoring import score_base, score_turn
from molora.continual.strategy import Turn
from molora.continual.tables import write_tables
from molora.continual.turn import drawn, passes, play_turn, teach_old_tasks, turn_recipe
from molora.data.clusters import need_kmeans
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.disk.atomic import write_folder, write_json
from molora.disk.manifest import read_json, verify_folder
from molora.errors import AdapterError, ConfigError
from molora.models.base import load_base, load_tokenizer
from molora.models.build import build_model, build_skeleton, labels_of_tasks, tasks_of
from molora.progress import phase, say
from molora.store.adapter import load
from molora.store.runs import Run
from molora.training.environment import at_work, prepare_process
from molora.training.optimise import check_device
from molora.training.resume import find_run
from molora.training.trackers import check_loggers
from molora.training.train import check_output, start_run, with_labels

ROW_FILE = "row.json"


def train_sequence(
    recipe: Recipe, overrides: Sequence[str] = (), resume: bool | str | os.PathLike[str] | None = None
) -> Run:
    """Train on a recipe's tasks one after another and measure what is forgotten.

    The run it returns has `matrix.json`, `matrix.csv` and `matrix.png`, `stages/NN-task` with a run folder each, and
    `adapter`, that of the last turn.

    Args:
        recipe: path of a YAML file with a `continual` section, the same as a mapping, or a RunConfig.
        overrides: `section.key=value` texts applied on top.
        resume: True continues the recipe's latest run, a path the run in that folder.

    Raises:
        ConfigError, DataError: before anything is written. DivergedError, InterruptedRun: as `molora.train`.
    """
    config = load_recipe(recipe, overrides)
    check_sequence(config)
    check_device(config.train)
    check_loggers(config.train)
    check_output(Path(config.output))
    tasks = tasks_of(config)
    check_held_out(config, tasks)
    config = with_labels(config, tasks)
    with at_work():
        run = find_run(config, resume)
        _check_same(config, run)
        _check_data(config, tasks)
        run = start_run(config) if run is None else run
        with run.lock():
            sequence = SequenceRun(config, tasks, run)
            if resume:
                sequence.say_where()
            return sequence.play()


def check_held_out(config: RunConfig, tasks: TaskSet) -> None:
    """Raise ConfigError for a task without held-out records."""
    keys = {"synthetic": "eval_size", "hub": "eval_split", "folder": "eval_split"}
    for task in tasks:
        if not len(task.eval):
            raise ConfigError(
                f"data.tasks.{task.name}: has no held-out records, so nothing can be said of forgetting.",
                hint=f"give it `{keys.get(config.data.tasks[task.name].source, 'eval')}`.",
            )


def check_sequence(config: RunConfig) -> None:
    """Raise ConfigError for a recipe that no sequence can be trained from here."""
    if config.continual is None:
        raise ConfigError(
            "the recipe has no `continual` section.",
            hint="add `continual: {strategy: ...}`, or use `molora train`.",
        )
    for turn in (0, len(config.data.tasks) - 1):  # a mixture must stay valid as it grows
        turn_recipe(config, dict.fromkeys(config.data.tasks, 0), turn)
    if config.train.devices not in (1, [0]) or config.train.strategy != "auto":
        raise ConfigError("a sequence of tasks is trained on one device; set train.devices: 1.")
    if config.continual.prototypes is not None:
        need_kmeans("continual.router")


def _check_same(config: RunConfig, run: Run | None) -> None:
    """Refuse changes that a single run may be resumed with, but that would make the turns of a sequence differ."""
    if run is None:
        return
    settings = [("train", name) for name in ("max_steps", "epochs")]
    settings += [("eval", name) for name in type(config.eval).model_fields]
    for section, name in settings:
        old, new = (getattr(getattr(one, section), name) for one in (run.config, config))
        if old != new:
            raise ConfigError(f"{section}.{name} is {new}, but {run.path} was started with {old}.")


def _check_data(config: RunConfig, tasks: TaskSet) -> None:
    """Find the targets and encode every task's records: a faulty one of the last task must not show after hours."""
    first, ids = turn_recipe(config, tasks.ids)
    build_skeleton(first, ids, labels_of_tasks(config.base, tasks))
    tokenizer = load_tokenizer(config.base)
    MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed).setup("fit")


def _read_row(folder: Path) -> dict[str, Any]:
    """A complete turn's row; AdapterError where somebody changed its form."""
    row = read_json(folder / ROW_FILE)
    parts = {"joint": bool, **dict.fromkeys(("shown", "hidden", "inferred", "unchanged", "overlap"), dict)}
    if not isinstance(row, dict) or any(not isinstance(row.get(name), kind) for name, kind in parts.items()):
        raise AdapterError(
            f"{folder / ROW_FILE} is not a row of the matrix.",
            hint="delete it: the stage is then finished anew",
        )
    return row


class SequenceRun:
    """One sequence run: its tasks in order, its folder, its strategy and what is remembered."""

    def __init__(self, config: RunConfig, tasks: TaskSet, run: Run) -> None:
        assert config.continual is not None
        self.config, self.settings, self.run = config, config.continual, run
        self.tasks = list(tasks)
        self.all_tasks = tasks
        self.joint = config.continual.strategy.spec.at_once
        self.strategy = build_strategy(self.settings.strategy)
        self.memory = Memory(self.strategy, self.settings.prototypes)

    @property
    def stages(self) -> list[Path]:
        """The turns' folders."""
        names = ["all"] if self.joint else [task.name for task in self.tasks]
        return [self.run.path / "stages" / f"{i:02d}-{name}" for i, name in enumerate(names, 1)]

    def say_where(self) -> None:
        """Say with which turn the run goes on, or that it has had them all."""
        done = sum((folder / ROW_FILE).is_file() for folder in self.stages)
        finished = done == len(self.stages)
        what = "is finished" if finished else f"goes on with task {done + 1} of {len(self.stages)}"
        say(f"{self.run.path} {what}")

    def play(self) -> Run:
        """Every turn that is not complete, then the tables; returns the run."""
        with phase("tasks", len(self.stages), "tasks") as shown:
            for index, folder in enumerate(self.stages):
                shown.now(f"{index + 1} of {len(self.stages)}, {folder.name.partition('-')[2]}")
                if not (folder / ROW_FILE).is_file():
                    self._play_turn(index, folder)
                write_tables(self.run.path, self.tasks, [_read_row(f) for f in self.stages[: index + 1]])
                shown.advance()
        self._publish(self.stages[-1])
        return self.run

    def _play_turn(self, index: int, folder: Path) -> None:
        seed = (self.config.seed + index) % 2**32
        prepare_process(seed)
        model, tokenizer = self._model(index)
        place = len(self.tasks) - 1 if self.joint else index
        task = self.tasks[place]
        turn = Turn(place, self.tasks, partial(passes, self.config, model, tokenizer, task), seed)
        if index:
            self.memory.load(self.stages[index - 1] / "memory", self.tasks)
        folder.mkdir(parents=True, exist_ok=True)
        play_turn(
            self._turn_config(seed, place),
            model,
            tokenizer,
            turn,
            self.strategy,
            partial(self._conclude, tokenizer, turn),
            known_ids=self.all_tasks.known_ids,
            expert=NewExpert() if index and not self.strategy.one_expert else None,
            softmax=self.settings.softmax,
            run=Run(folder),
        )

    def _model(self, index: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The model as the turn before left it; before the first, a new one with the first task's expert."""
        config, labels = self.config, labels_of_tasks(self.config.base, self.all_tasks)
        if index:
            base, tokenizer = load_base(config.base, labels)
            model = load(base, self.stages[index - 1] / "adapter", is_trainable=True)
            recipe, _ = turn_recipe(config, self.all_tasks.known_ids, index)
            teach_old_tasks(recipe, model, tokenizer, self.tasks[:index])
        else:
            first, ids = turn_recipe(config, self.all_tasks.known_ids)
            model, tokenizer = build_model(first, ids, labels)
        device = "cuda" if torch.cuda.is_available() and config.train.accelerator != "cpu" else "cpu"
        return model.to(device), tokenizer

    def _turn_config(self, seed: int, place: int) -> RunConfig:
        """The recipe with the turn's seed; all tasks at once get as many steps as they get one by one."""
        train, many = self.config.train, len(self.tasks) if self.joint else 1
        if train.max_steps is not None:
            train = train.model_copy(update={"max_steps": train.max_steps * many})
        recipe, _ = turn_recipe(self.config, self.all_tasks.known_ids, place)
        return recipe.model_copy(update={"seed": seed, "train": train})

    def _conclude(self, tokenizer: PreTrainedTokenizerBase, turn: Turn, done: Run, model: PeftModel) -> None:
        """After training: what must be remembered, and every task's score; the row comes last."""
        if (kept := self.settings.prototypes) is not None:
            for task in self.tasks if self.joint else [turn.task]:
                examples = drawn(self.config, tokenizer, task, kept.records)
                self.memory.learn(model, tokenizer, task, examples, turn.seed)
        base_file = self.run.path / "base.json"
        if not base_file.is_file():
            write_json(base_file, score_base(self.config, model, tokenizer, self.tasks))
        row = score_turn(self.config, model, tokenizer, turn, self.memory, read_json(base_file))
        self.memory.save(done.path / "memory")
        write_json(done.path / ROW_FILE, row)

    def _publish(self, last: Path) -> None:
        """The last turn's adapter as the run's own, so that every verb that takes a run takes this one."""
        if self.run.adapter.is_dir():
            return
        verify_folder(last / "adapter")
        with write_folder(self.run.adapter) as folder:
            for file in (last / "adapter").iterdir():
                if file.name != "MANIFEST.json":
                    shutil.copy2(file, folder / file.name)

"""TurnsRun: a run that learns in turns, each a run folder of its own; resumable between turns and inside one.

The folders of the turns are in `stages/`. A turn reads what it needs of earlier ones from their folders, and is complete once
its `row.json` is there, which is written last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig
from molora.config.grow import NewExpert
from molora.continual.memory import Memory
from molora.continual.scoring import score_base, score_turn
from molora.continual.strategy import Strategy, Turn
from molora.continual.turn import passes, play_turn, teach_old_tasks
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.disk.atomic import write_folder, write_json
from molora.disk.manifest import read_json, verify_folder
from molora.errors import AdapterError, ConfigError
from molora.models.base import load_base, load_tokenizer
from molora.models.build import build_model, build_skeleton, labels_of_tasks
from molora.progress import phase, say
from molora.store.adapter import load
from molora.store.runs import Run
from molora.training.environment import at_work, prepare_process
from molora.training.resume import find_run
from molora.training.steps import batches_of, total_steps
from molora.training.train import opened, start_run

ROW_FILE = "row.json"

Known = tuple[RunConfig, dict[str, int]]


class TurnsRun:
    """One run in turns: its tasks in the order they are learned, its folder, its strategy and what is remembered."""

    softmax: str | None = None  # whose labels compete in a classifier's loss; None: the strategy says

    def __init__(self, config: RunConfig, tasks: TaskSet, run: Run) -> None:
        self.config, self.run = config, run
        self.tasks = list(tasks)
        self.all_tasks = tasks
        self.strategy = self.make_strategy()
        self.memory = Memory(self.strategy, None if config.continual is None else config.continual.prototypes)

    # What kinds of runs differ in.

    @classmethod
    def check(cls, config: RunConfig, tasks: TaskSet) -> None:
        """Raise ConfigError for a recipe that cannot be trained so, or tasks that it cannot learn from."""
        raise NotImplementedError

    @classmethod
    def recipe_of(cls, config: RunConfig, ids: Mapping[str, int], index: int) -> Known:
        """The recipe of one turn alone, and the ids, of these, of the tasks that the adapter knows by then."""
        raise NotImplementedError

    @classmethod
    def tasks_of_turns(cls, config: RunConfig) -> list[list[str]]:
        """Names of the tasks that each turn is about."""
        raise NotImplementedError

    def make_strategy(self) -> Strategy:
        """What the turns are trained by."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """Of the turns, in their order."""
        raise NotImplementedError

    def learned(self, index: int) -> tuple[int, int]:
        """The last task of a turn, and how many it learns."""
        raise NotImplementedError

    def expert(self, index: int) -> NewExpert | None:
        """The expert that joins in a turn after the first; None: there is no new one."""
        raise NotImplementedError

    def remember(self, tokenizer: PreTrainedTokenizerBase, turn: Turn, model: PeftModel) -> None:
        """What must be kept of a turn before its tasks are scored, beside the strategy's own."""

    def write_tables(self, rows: Sequence[dict[str, Any]]) -> None:
        """The scores after each turn so far, into the run's folder."""
        raise NotImplementedError

    def finish(self) -> None:
        """What comes once the last turn is complete and its adapter is the run's."""

    # What they have in common.

    @property
    def stages(self) -> list[Path]:
        """The turns' folders."""
        return [self.run.path / "stages" / f"{i:02d}-{name}" for i, name in enumerate(self.names, 1)]

    def recipe(self, index: int) -> Known:
        """`recipe_of` this run."""
        return self.recipe_of(self.config, self.all_tasks.known_ids, index)

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
                shown.now(f"{index + 1} of {len(self.stages)}, {self.names[index]}")
                if not (folder / ROW_FILE).is_file():
                    self._play_turn(index, folder)
                self.write_tables([read_row(f) for f in self.stages[: index + 1]])
                shown.advance()
        self._publish(self.stages[-1])
        self.finish()
        return self.run

    def _play_turn(self, index: int, folder: Path) -> None:
        seed = (self.config.seed + index) % 2**32
        prepare_process(seed)
        model, tokenizer = self._model(index)
        place, count = self.learned(index)
        batches = partial(passes, self.config, model, tokenizer, self.tasks[place])
        turn = Turn(place, self.tasks, batches, seed, count)
        if index:
            self.memory.load(self.stages[index - 1] / "memory", self.tasks)
        folder.mkdir(parents=True, exist_ok=True)
        play_turn(
            self.recipe(index)[0].model_copy(update={"seed": seed}),
            model,
            tokenizer,
            turn,
            self.strategy,
            partial(self._conclude, tokenizer, turn),
            known_ids=self.all_tasks.known_ids,
            expert=self.expert(index) if index else None,
            softmax=self.softmax,
            run=Run(folder),
        )

    def _model(self, index: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The model as the turn before left it; before the first, a new one with the first expert."""
        config, labels = self.config, labels_of_tasks(self.config.base, self.all_tasks)
        recipe, ids = self.recipe(index)
        if index:
            base, tokenizer = load_base(config.base, labels)
            model = load(base, self.stages[index - 1] / "adapter", is_trainable=True)
            teach_old_tasks(recipe, model, tokenizer, self.tasks[: self.learned(index - 1)[0] + 1])
        else:
            model, tokenizer = build_model(recipe, ids, labels)
        device = "cuda" if torch.cuda.is_available() and recipe.train.accelerator != "cpu" else "cpu"
        return model.to(device), tokenizer

    def _conclude(self, tokenizer: PreTrainedTokenizerBase, turn: Turn, done: Run, model: PeftModel) -> None:
        """After training: what must be remembered, and every task's score; the row comes last."""
        self.remember(tokenizer, turn, model)
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


def train_in_turns(
    kind: type[TurnsRun], config: RunConfig, resume: bool | str | os.PathLike[str] | None = None
) -> Run:
    """Train in turns of some kind, in a new run folder or, with `resume`, in one that is there.

    Raises ConfigError or DataError before anything is written; DivergedError, InterruptedRun: as `molora.train`.
    """
    config, tasks = opened(config)
    kind.check(config, tasks)
    with at_work():
        run = find_run(config, resume)
        _check_same(config, run)
        _check_data(config, tasks, kind.recipe_of(config, tasks.ids, 0))
        run = start_run(config) if run is None else run
        with run.lock():
            playing = kind(config, tasks, run)
            if resume:
                playing.say_where()
            return playing.play()


def steps_of_turns(kind: type[TurnsRun], config: RunConfig, tasks: TaskSet) -> list[int]:
    """Optimiser steps of each turn; with `epochs`, of its own tasks alone, whatever its strategy replays."""
    found = []
    for index, own in enumerate(kind.tasks_of_turns(config)):
        train = kind.recipe_of(config, tasks.ids, index)[0].train
        found.append(total_steps(train, batches_of(tasks.only(own), train.batch_size)))
    return found


def check_held_out(config: RunConfig, tasks: TaskSet) -> None:
    """Raise ConfigError for a task without held-out records."""
    keys = {"synthetic": "eval_size", "hub": "eval_split", "folder": "eval_split"}
    for task in tasks:
        if not len(task.eval):
            raise ConfigError(
                f"data.tasks.{task.name}: has no held-out records, so nothing can be said of forgetting.",
                hint=f"give it `{keys.get(config.data.tasks[task.name].source, 'eval')}`.",
            )


def _check_same(config: RunConfig, run: Run | None) -> None:
    """Refuse changes that a single run may be resumed with, but that would make its turns differ."""
    if run is None:
        return
    settings = [("train", name) for name in ("max_steps", "epochs")]
    settings += [("eval", name) for name in type(config.eval).model_fields]
    for section, name in settings:
        old, new = (getattr(getattr(one, section), name) for one in (run.config, config))
        if old != new:
            raise ConfigError(f"{section}.{name} is {new}, but {run.path} was started with {old}.")


def _check_data(config: RunConfig, tasks: TaskSet, first: Known) -> None:
    """Find the targets and encode every task's records: a faulty one of the last task must not show after hours."""
    build_skeleton(*first, labels_of_tasks(config.base, tasks))
    tokenizer = load_tokenizer(config.base)
    MoLoraDataModule(config.data, tasks, tokenizer, config.train.batch_size, config.seed).setup("fit")


def read_row(folder: Path) -> dict[str, Any]:
    """A complete turn's row, see `score_turn`; AdapterError where somebody changed its form."""
    row = read_json(folder / ROW_FILE)
    parts = {"joint": bool, **dict.fromkeys(("shown", "hidden", "inferred", "unchanged", "overlap"), dict)}
    if not isinstance(row, dict) or any(not isinstance(row.get(name), kind) for name, kind in parts.items()):
        raise AdapterError(
            f"{folder / ROW_FILE} is not a row of the matrix.",
            hint="delete it: the stage is then finished anew",
        )
    return row

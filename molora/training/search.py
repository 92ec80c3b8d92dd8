"""search: train a recipe under other settings, again and again, and keep those that score best for their size.

A trial's value is its mean score over the tasks, less `cost` for each doubling of the recipe's trained parameters: what
twice the parameters must gain to be worth it. The recipe itself is the first trial, and with smaller ranks the next ones; then
settings are proposed by Optuna's TPE. A trial whose held-out loss is worse than the median of the others at a quarter, half
or three quarters of its steps ends there.
Nothing of a trial is kept but its numbers, in a journal that a killed search goes on from.

Reference: Optuna, arXiv:1907.10902.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from molora.config import RunConfig
from molora.config.load import recipe_text
from molora.config.search_space import Range, Space, as_plain, own_values, with_values
from molora.disk.atomic import write_file, write_json
from molora.disk.lock import exclusive
from molora.errors import ConfigError, DivergedError
from molora.evaluation.report import LOWER_IS_BETTER
from molora.models.build import build_model, build_skeleton, labels_of_tasks, tasks_of
from molora.progress import say
from molora.training.callbacks import Validation
from molora.training.checkpoint import StepCallback
from molora.training.environment import at_work, prepare_process
from molora.training.evaluate import score
from molora.training.journal import open_study, optuna_module
from molora.training.module import MoLoraModule
from molora.training.optimise import check_device, optimise
from molora.training.steps import total_steps
from molora.training.teach_router import teach_router
from molora.training.train import encoded, with_labels

JOURNAL, SETTINGS, TABLE, BEST = "journal.log", "search.json", "trials.csv", "best.yaml"
FEW = 4  # trials before proposals follow the others, and before any is cut short


@dataclass(frozen=True)
class Tried:
    """One trial: its settings and what became of them. `state`: complete, pruned, or why it could not train."""

    number: int
    values: Mapping[str, Any]
    state: str
    value: float | None = None
    score: float | None = None
    parameters: int | None = None


@dataclass
class Search:
    """A search in a folder.

    Args:
        config: the recipe.
        space: what is tried.
        trials: how many there shall be in all.
        cost: in the score's units, for each doubling of parameters.
        mode: of evaluation, `gate` or `task`.
    """

    config: RunConfig
    space: Space
    folder: Path
    trials: int = 12
    cost: float = 0.01
    mode: str = "gate"
    _study: Any = field(default=None, init=False)

    def run(self, *, resume: bool = False) -> list[Tried]:
        """Try until there are as many trials as wanted, and return all of them, the best first.

        Raises:
            ConfigError: optuna is missing, the folder is there already or has another search, the space or the recipe
                does not fit. Nothing was trained.
        """
        optuna_module()
        check_device(self.config.train)
        self._check()
        reference = _numbers(build_skeleton(*self._prepared(self.config)))
        self._open(resume)
        with exclusive(self.folder / "lock", wait=1.0), at_work():
            self._study = open_study(self.folder / JOURNAL, self.config.seed, FEW)
            if not self._study.trials:
                for values in self._first():
                    self._study.enqueue_trial(self._coded(values))
            for number in range(self._finished(), self.trials):
                say(f"trial {number + 1} of {self.trials}")
                self._try(reference)
                self._write()
        return self.tried()

    # -- what there is ---------------------------------------------------------------------------------

    def _check(self) -> None:
        for key, choices in self.space.items():
            values = [choices.low] if isinstance(choices, Range) else choices
            if not any(_fits(self.config, key, value) for value in values):
                with_values(self.config, {key: values[0]})  # says why
        for section in ("continual", "federated", "stages"):
            if getattr(self.config, section) is not None:
                raise ConfigError(f"a trial is one training; take out the recipe's `{section}` section.")
        without = [task.name for task in tasks_of(self.config) if not len(task.eval)]
        if without:
            raise ConfigError(
                f"a search compares held-out scores, and these tasks have none: {', '.join(without)}."
            )

    def _open(self, resume: bool) -> None:
        """Make the folder, or go on with the search that is in it."""
        settings = {
            "recipe": self.config.model_dump(mode="json"), "space": as_plain(self.space), "cost": self.cost, "mode": self.mode,
        }  # fmt: skip
        there = self.folder / SETTINGS
        if resume and not there.is_file():
            raise ConfigError(f"{self.folder} has no search to go on with.", hint="leave out --resume.")
        if not resume and self.folder.exists():
            raise ConfigError(
                f"{self.folder} is there already.", hint="go on with --resume, or choose another --out."
            )
        if resume:
            before = json.loads(there.read_text(encoding="utf-8"))
            changed = [
                key for key, value in settings.items() if before.get(key) != json.loads(json.dumps(value))
            ]
            if changed:
                raise ConfigError(
                    f"{self.folder} was started with another {' and '.join(changed)}.",
                    hint="go on with what it was started with, or choose another --out.",
                )
            return
        self.folder.mkdir(parents=True)
        write_json(there, settings)

    def _first(self) -> list[dict[str, Any]]:
        """What is tried before anything is proposed: the recipe, then with each smaller rank, the largest first."""
        own = own_values(self.config, self.space)
        ranks, r = self.space.get("adapter.r", []), own.get("adapter.r")
        if isinstance(ranks, Range) or not isinstance(r, int):
            return [own]
        smaller = sorted({rank for rank in ranks if isinstance(rank, int) and rank < r}, reverse=True)
        return [own, *({**own, "adapter.r": rank} for rank in smaller)]

    def _coded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values as Optuna keeps them, where the space has them."""
        found: dict[str, Any] = {}
        for key, choices in self.space.items():
            value = values[key]
            if isinstance(choices, Range):
                if choices.low <= value <= choices.high:
                    found[key] = value
            elif value in choices:
                found[key] = json.dumps(value)
        return found

    def _finished(self) -> int:
        return len([t for t in self._study.trials if t.state.name in ("COMPLETE", "PRUNED")])

    def tried(self) -> list[Tried]:
        """Every finished trial, the best first; those without a value last."""
        found = [
            Tried(
                t.number, {key: self._decoded(key, value) for key, value in t.params.items()},
                t.user_attrs.get("why", t.state.name.lower()), t.value if t.state.name == "COMPLETE" else None,
                t.user_attrs.get("score"), t.user_attrs.get("parameters"),
            )
            for t in self._study.trials if t.state.name in ("COMPLETE", "PRUNED")
        ]  # fmt: skip
        return sorted(found, key=lambda one: (one.value is None, -(one.value or 0.0), one.number))

    def _decoded(self, key: str, value: Any) -> Any:
        return value if isinstance(self.space[key], Range) else json.loads(value)

    # -- one trial -------------------------------------------------------------------------------------

    def _try(self, reference: int) -> None:
        optuna = optuna_module()
        trial = self._study.ask()
        values = {key: self._proposed(trial, key) for key in self.space}
        say("  " + ", ".join(f"{key.split('.')[-1]} {short(value)}" for key, value in values.items()))
        pruned = optuna.trial.TrialState.PRUNED
        try:
            found, numbers = self._trained(trial, with_values(self.config, values))
        except optuna.TrialPruned:
            self._study.tell(trial, state=pruned)
            say("  cut short: its held-out loss is worse than the median")
        except (ConfigError, DivergedError) as error:
            trial.set_user_attr("why", str(error).splitlines()[0])
            self._study.tell(trial, state=pruned)
            say(f"  not possible: {str(error).splitlines()[0]}")
        else:
            trial.set_user_attr("score", found)
            trial.set_user_attr("parameters", numbers)
            value = found - self.cost * math.log2(numbers / reference)
            self._study.tell(trial, value)
            say(f"  score {found:.4f}, {numbers:,} parameters, value {value:.4f}")

    def _proposed(self, trial: Any, key: str) -> Any:
        choices = self.space[key]
        if isinstance(choices, Range):
            return trial.suggest_float(key, choices.low, choices.high, log=choices.log)
        return json.loads(trial.suggest_categorical(key, [json.dumps(choice) for choice in choices]))

    @staticmethod
    def _prepared(config: RunConfig) -> tuple[RunConfig, dict[str, int], Any]:
        tasks = tasks_of(config)
        return with_labels(config, tasks), tasks.ids, labels_of_tasks(config.base, tasks)

    def _trained(self, trial: Any, config: RunConfig) -> tuple[float, int]:
        """Mean score of a recipe that is trained in memory, and its trained parameters."""
        tasks = tasks_of(config)
        config = with_labels(config, tasks)
        prepare_process(config.seed)
        model, tokenizer = build_model(config, tasks.ids, labels_of_tasks(config.base, tasks))
        numbers = _numbers(model)
        data = encoded(config, tasks, tokenizer)
        steps = total_steps(config.train, len(data.train_dataloader()))
        watch = _Watch(trial, Validation(data.val_dataloader(), 1, None), max(1, steps // 4))
        settings = config.train.model_copy(update={"val_every": None, "patience": None})
        trainer = optimise(model, data, settings, callbacks=[watch])
        model = model.to(trainer.strategy.root_device).eval()
        teach_router(model, tokenizer, data, config.eval.batch_size, config.seed)
        report = score(config, model, tokenizer, list(tasks), [self.mode])
        scores = [-s.value if s.metric in LOWER_IS_BETTER else s.value for s in report.scores]
        return sum(scores) / len(scores), numbers

    # -- what is written -------------------------------------------------------------------------------

    def _write(self) -> None:
        """The table of all trials and the best recipe so far."""
        found = self.tried()
        text = io.StringIO()
        out = csv.writer(text)
        out.writerow(["trial", "value", "score", "parameters", "state", *self.space])
        for one in found:
            cells = [json.dumps(one.values[key]) if key in one.values else "" for key in self.space]
            out.writerow([one.number, one.value, one.score, one.parameters, one.state, *cells])
        write_file(self.folder / TABLE, text.getvalue().encode())
        if found and found[0].value is not None:
            best = with_values(self.config, found[0].values)
            write_file(self.folder / BEST, recipe_text(best).encode())


class _Watch(StepCallback):
    """Reports a trial's held-out loss every so many steps, and ends it where that is hopeless."""

    def __init__(self, trial: Any, validation: Validation, every: int) -> None:
        self.trial, self.validation, self.every = trial, validation, every

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if step % self.every or step == trainer.max_steps:
            return
        assert isinstance(module, MoLoraModule)
        self.trial.report(-self.validation.loss(trainer, module), step)
        if self.trial.should_prune():
            raise optuna_module().TrialPruned


def _numbers(model: Any) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _fits(config: RunConfig, key: str, value: Any) -> bool:
    try:
        with_values(config, {key: value})
    except ConfigError:
        return False
    return True


def short(value: Any) -> str:
    """A setting in a few letters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return str(value.get("kind") or value.get("scope"))
    return str(value) if len(str(value)) < 30 else str(value)[:27] + "..."

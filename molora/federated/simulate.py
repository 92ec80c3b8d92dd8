"""federate: rounds of clients in one process, from a recipe to a run folder, resumable between rounds.

A client is the recipe's model with the round's adapter, trained as `molora train` would for a few steps on its own
records, and it sends what a real one would: a folder. The run's `rounds` is the folder of a server (`folder.py`). A round
depends on the adapter it starts from, the recipe and its number alone, so that one that was interrupted is started anew
and ends as it would have.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig, load_recipe
from molora.config.load import Recipe
from molora.data.module import MoLoraDataModule
from molora.data.tasks import TaskSet
from molora.disk.atomic import check_target, remove_folder
from molora.errors import ConfigError, DivergedError
from molora.federated.folder import adapter_of, copy_adapter, repeats, rounds_done
from molora.federated.partition import split
from molora.federated.record import send
from molora.federated.round import Round
from molora.models.base_check import check_base, check_lengths
from molora.models.build import build_model, labels_of_tasks
from molora.progress import Phase, phase, say
from molora.report.plots import LOSSES, plot_loss, read_metrics
from molora.store.adapter import save
from molora.store.hotswap import hotswap
from molora.store.runs import Run
from molora.training.environment import at_work, prepare_process
from molora.training.evaluate import evaluate_run
from molora.training.loggers import MetricsCsv
from molora.training.optimise import optimise
from molora.training.resume import find_run
from molora.training.train import encoded, opened, start_run, write_config

_WORTH_SAYING = 1e-6  # of an update, beyond rounding


def federate(
    recipe: Recipe, overrides: Sequence[str] = (), resume: bool | str | os.PathLike[str] | None = None
) -> Run:
    """Train in rounds of simulated clients as a recipe's `federated` section says, evaluate, and return the run folder.

    Args:
        recipe: path of a YAML file, the same as a mapping, or a RunConfig.
        overrides: `section.key=value` texts applied on top.
        resume: True continues the recipe's latest run, a path the run in that folder; it ends with the very weights of an
            uninterrupted one (float32, same machine). A larger `federated.rounds` lengthens it.

    Raises:
        ConfigError, DataError: the recipe or the data cannot be used; nothing was written.
        AdapterError: a round had too few usable updates too often.
    """
    config = load_recipe(recipe, overrides)
    if config.federated is None:
        hint = "add `federated: {clients: 8, rounds: 10}`, or use `molora train`."
        raise ConfigError("the recipe has no `federated` section.", hint=hint)
    config, tasks = opened(config)
    prepare_process(config.seed)
    with at_work():
        run = find_run(config, resume)
        model, tokenizer = build_model(config, tasks.ids, labels_of_tasks(config.base, tasks))
        check_base(config, model, tokenizer)
        cuda = torch.cuda.is_available() and config.train.accelerator != "cpu"
        clients = _clients(config, tasks, model, tokenizer)
        run = start_run(config) if run is None else run
        with run.lock():
            check_target(run.adapter)
            write_config(run, config)
            copy_adapter(_Simulation(config, model, clients, run).play(), run.adapter)
            hotswap(model.to("cuda" if cuda else "cpu"), run.adapter)
            plot_loss(run.path / "metrics.csv", run.path / "loss.png", LOSSES)
            evaluate_run(run, model.eval(), tokenizer, tasks)
    return run


def _clients(
    config: RunConfig, tasks: TaskSet, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, MoLoraDataModule]:
    """Name -> the client's records, read and encoded."""
    assert config.federated is not None
    parts = split(tasks, config.federated, config.seed)
    width = len(str(len(parts)))
    made = {f"client_{i:0{width}d}": encoded(config, own, tokenizer) for i, own in enumerate(parts, 1)}
    check_lengths(config, model, [row for data in made.values() for row in data.summary()])
    return made


class _Simulation:
    """One run: its model, its clients' data and its server's folder."""

    def __init__(
        self, config: RunConfig, model: PeftModel, clients: dict[str, MoLoraDataModule], run: Run
    ) -> None:
        assert config.federated is not None
        self.settings, self.seed, self.model, self.clients = config.federated, config.seed, model, clients
        self.path, self.server, self.inbox = run.path, run.path / "rounds", run.path / "clients"
        steps = self.settings.local_steps
        every = min(config.train.log_every, steps)
        self.train = config.train.model_copy(update={"max_steps": steps, "epochs": None, "log_every": every})
        self.kept = config.train.keep_checkpoints

    def play(self) -> Path:
        """Every round that is left; returns the last one's adapter."""
        done, total = max(rounds_done(self.server), default=-1), self.settings.rounds
        if done < 0:
            save(self.model, adapter_of(self.server, 0))
        else:
            going = (
                f"goes on with round {done + 1}" if done < total else "is finished, it is only scored again"
            )
            say(f"{self.path} {going} (of {total}; federated.rounds lengthens it)")
        done = max(done, 0)
        metrics = MetricsCsv(self.path / "metrics.csv", done * self.settings.local_steps)
        with phase("rounds", total, "rounds", done=done) as shown:
            while done < total:
                closed, loss = self._round(done + 1, metrics, shown)
                done += closed
                shown.reach(done)
                if loss is not None:
                    shown.tell(f"loss {loss:.4g}" if closed else f"loss {loss:.4g}, to be repeated")
        return adapter_of(self.server, done)

    def _round(self, number: int, metrics: MetricsCsv, shown: Phase) -> tuple[bool, float | None]:
        """Ask the clients of a round: whether it closed, else it has to be repeated, and the mean loss of those that sent."""
        key = f"{self.seed}/{number}/{repeats(self.server, number)}"
        asked = sorted(random.Random(key).sample([*self.clients], self.settings.asked))
        settings = self.settings.model_dump(include={"aggregate", "min_clients", "max_repeats"})
        due = Round(self.server, clients=asked, **settings)
        shutil.rmtree(self.inbox, ignore_errors=True)
        losses: dict[str, float] = {}
        for name in asked:
            shown.now(f"{number} of {self.settings.rounds}, {name}")
            loss = self._client(name, due, random.Random(f"{key}/{name}").getrandbits(32))
            losses |= {} if loss is None else {name: loss}
        mean = None
        if losses:  # before the round is over: a row too many is dropped on resuming, a missing one is not made up for
            mean = fmean(losses.values(), weights=[self._records(name) for name in losses])
            metrics.log_metrics({"loss": mean}, number * self.settings.local_steps)
        outcome = due.collect([(name, self.inbox / name) for name in losses])
        for decision in outcome.decisions:
            if not decision.accepted:
                say(f"round {number}: {decision.client} left out, {decision.fault}: {decision.reason}")
        shutil.rmtree(self.inbox, ignore_errors=True)
        if outcome.lost > _WORTH_SAYING:
            say(f"round {number}: folding to the rank cut off {outcome.lost:.1%} of the update's norm")
        for old in rounds_done(self.server)[: -self.kept]:
            remove_folder(adapter_of(self.server, old))
        return outcome.adapter is not None, mean

    def _client(self, name: str, due: Round, seed: int) -> float | None:
        """Train a client's copy and send it; its mean loss, or None where it diverged and sends nothing."""
        prepare_process(seed)
        hotswap(self.model, due.start.folder)
        data, metrics = self.clients[name], MetricsCsv(self.inbox / name / "metrics.csv")
        data.seed = seed
        metrics.path.parent.mkdir(parents=True)
        try:
            optimise(self.model, data, self.train, loggers=[metrics])
        except DivergedError as error:
            say(f"{name} sends nothing: {error.message}")
            return None
        folder, start = self.inbox / name, due.start.folder
        send(self.model, folder, start, client=name, round=due.number, records=self._records(name))
        return fmean(value for _, value in read_metrics(metrics.path)["loss"])

    def _records(self, name: str) -> int:
        data = self.clients[name]
        return sum(len(data.examples(task.name, "train")) for task in data.tasks)

"""A run scored by lm-evaluation-harness on tasks of its own (extra `lm-eval`): `molora eval RUN --lm-eval NAMES`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.config.suggest import did_you_mean
from molora.data.clusters import inference
from molora.disk.atomic import write_file, write_folder
from molora.errors import ConfigError
from molora.evaluation.harness import HarnessScore, scores_of
from molora.evaluation.modes import in_mode, usable_modes
from molora.models.build import load_trained
from molora.store.runs import Run
from molora.training.environment import at_work
from molora.training.evaluate import new_evaluation

SCORES_FILE = "lm_eval.json"


def evaluate_with_lm_eval(
    run: str | Path,
    names: Sequence[str],
    *,
    routes: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    allow_other_base: bool = False,
) -> tuple[list[HarnessScore], Path]:
    """Score a trained run on the harness's tasks; the scores, and the file in the run's `evaluations` that has them.

    Args:
        run: a run folder, or the folder of a run's name.
        names: tasks of the harness, or of `include_path`.
        routes: tasks of the run whose experts answer, one after another; none: whatever decides without an id. The base
            alone is scored in any case.
        include_path: a folder with tasks of your own, in the harness's YAML.
        limit: score only the first so many documents of each task.

    Raises:
        ConfigError: the package is not installed, a name is unknown, or the run needs a task and none was named.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs the package lm-eval, which is not installed.",
            hint="pip install 'molora[lm-eval]'",
        )
    found = Run.find(Path(run))
    config = found.config
    for route in routes:
        if route not in config.data.tasks:
            known = ", ".join(config.data.tasks)
            meant = did_you_mean(route, [*config.data.tasks])
            raise ConfigError(f"the run has no task {route!r}.{meant} Its tasks: {known}.")
    manager = _tasks(names, include_path)
    with at_work():
        model, tokenizer, _ = load_trained(found.path, allow_other_base=allow_other_base)
        modes: list[tuple[str, str | None]] = [("task", route) for route in routes]
        modes = modes or [(usable_modes(model, ["gate"])[0][0], None)]
        scores: list[HarnessScore] = []
        size = 1 if _pools(model) else config.eval.batch_size
        with inference(model):
            for mode, whose in [*modes, ("base", None)]:
                with in_mode(model, whose, mode):
                    results = _run(model, tokenizer, names, manager, size, config.data.max_length, limit)
                scores += scores_of(results, mode if whose is None else f"{mode} {whose}")
    folder = new_evaluation(found)
    with write_folder(folder) as made:
        text = json.dumps({"scores": [asdict(score) for score in scores], "limit": limit}, indent=1)
        write_file(made / SCORES_FILE, text.encode())
    return scores, folder / SCORES_FILE


def _tasks(names: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's table of tasks; ConfigError where it lacks one of the names."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--lm-eval-tasks {include_path}: there is no such folder.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if not manager.match_tasks([name]):
            meant = did_you_mean(name, manager.all_tasks)
            hint = "`lm-eval ls tasks` lists all; a folder with your own goes with --lm-eval-tasks."
            raise ConfigError(f"lm-eval has no task {name!r}.{meant}", hint=hint)
    return manager


def _pools(model: Any) -> bool:
    """Whether a gate or the router reads whole texts: the harness pads batches and passes no mask, so one at a time."""
    config = model.active_peft_config
    return (
        config.gate.scope in ("sequence", "two_pass")
        or config.gate.blend is not None
        or config.router is not None
    )


def _run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    batch_size: int,
    max_length: int,
    limit: int | None,
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    found: Mapping[str, Any] = simple_evaluate(
        wrapped, tasks=[*names], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return found

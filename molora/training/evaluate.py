"""evaluate: score a run or an adapter, and write the report with its tables and pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.config import RunConfig, load_recipe
from molora.config.load import Recipe, recipe_text
from molora.data.audit import label_counts, majority_of
from molora.data.clusters import inference
from molora.data.tasks import Task, TaskSet
from molora.disk.atomic import check_writable, write_file, write_folder
from molora.disk.out_folder import check_out
from molora.errors import ConfigError
from molora.evaluation.counterfactual import counterfactuals
from molora.evaluation.modes import check_modes
from molora.evaluation.naming import naming
from molora.evaluation.predictions import PREDICTIONS_FILE, to_jsonl
from molora.evaluation.report import LOWER_IS_BETTER, Report, check_floors
from molora.evaluation.routing import RoutingSummary
from molora.evaluation.runner import evaluate_tasks
from molora.evaluation.score import Limits
from molora.evaluation.similarity import similarity
from molora.models.build import load_trained, tasks_of
from molora.models.task_router import names_tasks
from molora.report.html import render
from molora.report.plots import curve_of, plot_before_after, plot_heatmap, plot_scores
from molora.report.tables import routing_title
from molora.store.adapter import read_config
from molora.store.runs import REPORT_FILE, Run
from molora.training.environment import at_work, describe_environment

Source = str | os.PathLike[str] | Run


def evaluate(
    run_or_adapter: Source,
    *,
    tasks: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    overrides: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    allow_other_base: bool = False,
    floors: Mapping[str, float] | None = None,
    what_if: int | None = None,
    shapley: bool = False,
    checkpoint: int | None = None,
    predictions: bool = False,
) -> Report:
    """Score a trained mixture on held-out records.

    Args:
        run_or_adapter: a run folder, `runs/<name>`, a Run, or an adapter folder (which needs `recipe`).
        tasks: names of the tasks to score; default all of the recipe.
        modes: `gate`, `task`, `base`; default the recipe's.
        recipe: data and settings to use instead of the run's own.
        overrides: `section.key=value` texts applied on top.
        out: folder for report.json, report.csv, report.html and pictures; it appears whole or not at all. It must be
            new, empty, or one that an evaluation wrote. Default: `evaluations/<n>` in the run, so that the report of
            its training stays. An adapter folder without `out` is only scored. The report's `folder` says where it is.
        allow_other_base: go on where the base is not the one the adapter was trained on; shapes must still fit.
        floors: what `check_thresholds` will be asked afterwards; refused here where that could not be judged.
        what_if: also score the first so many records of each task with every expert alone, with every expert left out,
            and with even weights; see `counterfactuals`.
        shapley: of the same records, how much of each score every expert accounts for; up to 8 experts.
        checkpoint: score a run as it was after this step.
        predictions: write every record's answer and the experts it used to predictions.jsonl in the report's folder. The
            report's `predictions` hold the answers in any case.

    Raises:
        ConfigError: unknown tasks or modes, floors that are no shares, or a folder that may not be written, before any
            model is loaded.
        AdapterError: a damaged adapter.
    """
    path = run_or_adapter.path if isinstance(run_or_adapter, Run) else Path(run_or_adapter)
    run = None if (path / "adapter_config.json").is_file() else Run.find(path)
    source = recipe if recipe is not None or run is None else run.config
    if source is None:
        raise ConfigError(
            f"{path} is an adapter folder, which holds no data to score.", hint="name a recipe with --recipe."
        )
    config = load_recipe(source, overrides)
    if predictions and out is None and run is None:
        raise ConfigError("predictions need a folder to be written to.", hint="give --out FOLDER.")
    if out is not None:
        check_out(out, run.path if run else path, mark=REPORT_FILE)
    elif run is not None:
        check_writable(run.evaluations)
    begun = checkpoint is not None and run is not None and not run.adapter.is_dir()
    known = {} if begun else read_config(run.trained_adapter if run else path).task_ids
    task_set = tasks_of(config, known_ids=known or {})
    chosen = [task_set[name] for name in (task_set.ids if tasks is None else tasks)]
    check_floors(floors or {}, {task.name: task.metric for task in chosen})
    if modes is not None:
        check_modes(modes)
    with at_work():
        model, tokenizer, _ = load_trained(
            run.path if run else path, allow_other_base=allow_other_base, checkpoint=checkpoint
        )
        report = score(config, model, tokenizer, chosen, modes, what_if, shapley, experts=predictions)
    if checkpoint is not None:
        report.facts["checkpoint"] = f"step {checkpoint}"
    report.folder = Path(out) if out is not None else None if run is None else new_evaluation(run)
    if report.folder is not None:
        with write_folder(report.folder) as folder:
            write_report(report, folder, config)
            if predictions:
                write_file(folder / PREDICTIONS_FILE, to_jsonl(report.predictions).encode())
    return report


def evaluate_run(run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, tasks: TaskSet) -> Report:
    """Score the tasks of a run that has just been trained, and write the report into its folder.

    Tasks without held-out records are named in a note instead.
    """
    report = score(run.config, model, tokenizer, [task for task in tasks if len(task.eval)])
    skipped = [task.name for task in tasks if not len(task.eval)]
    if skipped:
        report.notes.append(f"not scored, for want of held-out records: {', '.join(skipped)}.")
    write_report(report, run.path, run.config)
    return report


def score(
    config: RunConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    modes: Sequence[str] | None = None,
    what_if: int | None = None,
    shapley: bool = False,
    *,
    experts: bool = False,
) -> Report:
    """Score these tasks under a recipe's `eval` section; `what_if` and `shapley` as of `evaluate`, `experts` as of
    `evaluate_tasks`."""
    report = Report()
    if tasks:
        modes, limits = config.eval.modes if modes is None else modes, Limits.of(config)
        report = evaluate_tasks(model, tokenizer, tasks, modes=modes, limits=limits, experts=experts)
        if names_tasks(model):
            report.naming = naming(model, tokenizer, tasks, limits)
            report.facts |= report.naming.facts()
        if report.routing is not None:
            report.similarity = similarity(model)
            if what_if is not None:
                mode = report.routing.mode
                with inference(model):
                    report.counterfactuals = counterfactuals(
                        model, tokenizer, tasks, mode=mode, limits=limits, records=what_if, attribute=shapley
                    )
    report.notes += [note for task in tasks if (note := against_majority(report, task)) is not None]
    report.environment = describe_environment()
    return report


def against_majority(report: Report, task: Task) -> str | None:
    """What to say of a classification whose accuracy is no better than one answer to everything (at 5 %, one-sided)."""
    score = next((s for s in report.scores if s.task == task.name and s.mode != "base"), None)
    if task.kind != "classification" or score is None or score.metric != "accuracy":
        return None
    always = majority_of(label_counts(task, "train"), label_counts(task, "eval"))
    if always is None:
        return None
    label, share = always
    if score.value > share + 1.645 * math.sqrt(share * (1 - share) / score.count):
        return None
    remedy = "more steps, a larger train.lr"
    if task.task_type == "SEQ_CLS" and not task.classes:
        remedy = "base.head: match (no head to learn), a larger train.head_lr, more steps"
    return f"{task.name}: {score.text()} is no better than always saying {label!r} ({100 * share:.1f} %); try {remedy}."


def write_report(report: Report, folder: Path, config: RunConfig) -> None:
    """report.json, report.csv, report.html and the pictures, each replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", report.to_json().encode())
    write_file(folder / "report.csv", report.to_csv().encode())
    draw(report, folder)
    page = render(report, title=f"molora: {config.name}", curves=curve_of(folder), config=recipe_text(config))
    write_file(folder / "report.html", page.encode())


def draw(report: Report, folder: Path) -> list[Path]:
    """The pictures a report has something to show in."""
    pictures = []
    if any(row.metric not in LOWER_IS_BETTER for row in report.scores):
        pictures.append(plot_scores(report, folder / "scores.png"))
        if any(row.metric not in LOWER_IS_BETTER for row in report.before):
            pictures.append(plot_before_after(report, folder / "before_after.png"))
    if report.routing and report.routing.gates:
        pictures += draw_routing(report.routing, folder)
    return pictures


def draw_routing(routing: RoutingSummary, folder: Path) -> list[Path]:
    """Heat maps of task x expert and layer x expert."""
    title = routing_title(routing)
    found = {"task": routing.task_expert(), "layer": routing.layer_expert()}
    return [
        plot_heatmap(
            matrix,
            folder / f"{rows}_expert.png",
            title=title.replace("task x", f"{rows} x"),
            xlabel="expert",
            ylabel=rows,
        )
        for rows, matrix in found.items()
    ]


def new_evaluation(run: Run) -> Path:
    """A run's folder for one more evaluation: the next number, made at once, so that another process takes another."""
    while True:
        taken = [
            int(entry.name)
            for entry in run.evaluations.glob("*")
            if entry.name.isascii() and entry.name.isdigit()
        ]
        folder = run.evaluations / str(max(taken, default=0) + 1)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder

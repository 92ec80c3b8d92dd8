"""merge_experts: a new run in which one expert serves the tasks of several, every task scored before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from molora.config import RunConfig, load_recipe
from molora.continual.grow import derived
from molora.evaluation.report import Report
from molora.models.build import load_trained, tasks_of
from molora.models.label_match import add_labels
from molora.store.adapter import save
from molora.store.runs import REPORT_FILE, Run
from molora.training.environment import at_work, prepare_process
from molora.training.evaluate import score, write_report
from molora.training.train import check_machine, start_run, with_labels
from molora.tuner.config import MoLoraConfig


def merge_experts(
    run: str | os.PathLike[str] | Run,
    names: Sequence[str],
    into: str,
    *,
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
    allow_other_base: bool = False,
) -> Run:
    """Replace experts of a run by one, in a new run folder; nothing is trained, and the old run is not touched.

    What the new expert is, and the other arguments: see `tuner.merge_experts`. Scores from before are those of the run's report.

    Args:
        allow_other_base: go on where the base is not the one the run was trained on; shapes must still fit.

    Raises:
        ConfigError, DataError, AdapterError: before anything is written.
    """
    parent = run if isinstance(run, Run) else Run.find(run)
    check_machine(parent.config)
    prepare_process(parent.config.seed)
    with at_work():
        model, tokenizer, _ = load_trained(parent.path, allow_other_base=allow_other_base)
        scored = parent.path / REPORT_FILE
        before = Report.from_json(scored.read_text(encoding="utf-8")).scores if scored.is_file() else []
        model.merge_experts(names, into, weights=weights, rank=rank)
        adapter: MoLoraConfig = model.active_peft_config
        tasks = tasks_of(parent.config, known_ids=adapter.task_ids)
        config = merged_config(with_labels(parent.config, tasks), adapter, into, parent)
        if config.base.head == "match":
            add_labels(model, tokenizer, tasks.label_texts)
        made = start_run(config)
        with made.lock():
            save(model, made.adapter)
            report = score(config, model, tokenizer, [task for task in tasks if len(task.eval)])
            report.before = before
            report.facts |= {
                "parent": f"{parent.path.parent.name}/{parent.path.name}",
                "merged": f"{', '.join(names)} into {into}",
            }
            write_report(report, made.path, config)
    return made


def merged_config(config: RunConfig, adapter: MoLoraConfig, into: str, parent: Run) -> RunConfig:
    """The recipe of the new run: the old one with the experts and tasks that the adapter has by now."""
    plain = derived(config, into, parent.path)
    names = list(adapter.expert_names or [])
    plain["adapter"]["expert_names"], plain["adapter"]["num_experts"] = names, len(names)
    plain["adapter"]["tasks"] = dict(adapter.tasks or {})
    return load_recipe(plain)

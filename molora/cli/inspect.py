"""`molora inspect`: what is in a trained run or adapter, and which expert does what."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from molora.cli.options import AsJson, OtherBase, RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from molora.evaluation.report import Report
    from molora.evaluation.routing import RoutingSummary


def command(
    run: RunFolder,
    out: Annotated[Path | None, Option(help="Folder for the pictures; default: the run's.")] = None,
    as_json: AsJson = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Show parameters, experts, tasks, and which expert does what.

    Example: molora inspect runs/quickstart
    """
    from molora.errors import AdapterError
    from molora.evaluation.report import Report
    from molora.models.build import load_trained
    from molora.report.tables import console
    from molora.store.runs import Run
    from molora.training.environment import quiet_libraries
    from molora.training.evaluate import draw_routing

    with quiet_libraries():
        model, _, config = load_trained(run, trainable=True, allow_other_base=allow_other_base)
    facts = describe(model)
    folder = Run.find(run).path if config is not None else None
    report = None
    for file in Run(folder).reports if folder is not None else ():
        try:
            report = Report.from_json(file.read_text(encoding="utf-8"))
        except AdapterError as error:
            raise AdapterError(f"{file}: {error}") from error
        if report.routing is not None:
            break
    to = console()
    say = partial(to.print, markup=False)
    if as_json:
        whole = {**facts, "routing": report.to_dict()["routing"] if report else None}
        say(json.dumps(whole, indent=2, ensure_ascii=False), soft_wrap=True)
        return
    _print_facts(facts, say)
    if report is None or report.routing is None:
        say("routing: not recorded here; `molora eval RUN` records it.")
        return
    _print_routing(report, report.routing, to)
    pictures = out or folder
    assert pictures is not None
    if out is None and not os.access(pictures, os.W_OK):
        say(f"{pictures} cannot be written; --out FOLDER draws pictures.")
        return
    pictures.mkdir(parents=True, exist_ok=True)
    for picture in draw_routing(report.routing, pictures):
        say(f"picture: {picture}")


def describe(model: Any) -> dict[str, Any]:
    """Everything `inspect` knows without data: parameter counts, experts, tasks, initialisation."""
    from molora.forward.dispatch import ways_in_use
    from molora.training.optimizer import parameters_by_role
    from molora.tuner.parts import init_std_report

    roles = {role: sum(p.numel() for p in group) for role, group in parameters_by_role(model).items()}
    config, ids = model.active_peft_config, model.task_ids
    frozen = config.frozen_experts
    return {
        "parameters": {**roles, "all": sum(p.numel() for p in model.parameters())},
        "layers": len(model.base_model.targeted_module_names),
        "gate": {"scope": config.gate.scope, "select": config.gate.select, "share": config.gate.share},
        "virtual_tokens": config.num_virtual_tokens,
        "experts": {name: "frozen" if name in frozen else "trainable" for name in model.expert_names},
        "tasks": {name: {"id": ids[name], "experts": experts} for name, experts in model.tasks.items()},
        "router": _router(model),
        "computed": ways_in_use(model),
        "init": init_std_report(model),
    }


def _router(model: Any) -> dict[str, Any] | None:
    """The adapter's task router: its settings, and how many prompts of each task it learned from."""
    from dataclasses import asdict

    from molora.tuner.api import find_context
    from molora.tuner.router import where_it_reads

    found = find_context(model).adapters[str(model.active_adapter)]
    if found.router is None:
        return None
    learned = {found.task_map.name(task): count for task, count in found.router.seen.items()}
    reads = where_it_reads(model.get_base_model(), find_context(model), str(model.active_adapter))
    return {**asdict(found.config.router), "reads": reads, "learned": learned}


def _print_facts(facts: dict[str, Any], say: Callable[[str], None]) -> None:
    counts = {role: n for role, n in facts["parameters"].items() if role != "all"}
    parts = ", ".join(f"{role} {n:,}" for role, n in counts.items() if n)
    say(f"parameters: {facts['parameters']['all']:,}, trainable {sum(counts.values()):,} ({parts})")
    say(f"layers: {facts['layers']}; gate: {', '.join(f'{k} {v}' for k, v in facts['gate'].items())}")
    say(f"experts: {', '.join(f'{name} ({state})' for name, state in facts['experts'].items())}")
    if facts["virtual_tokens"] is not None:
        say(f"virtual tokens: {facts['virtual_tokens']} of each expert, before a sample's own")
    for name, task in facts["tasks"].items():
        experts = ", ".join(f"{expert} {weight:.2f}" for expert, weight in task["experts"].items())
        say(f"task {name} (id {task['id']}): {experts}")
    if facts["router"] is not None:
        learned = ", ".join(f"{name} {count}" for name, count in facts["router"]["learned"].items())
        say(f"router: {facts['router']['kind']}, {facts['router']['reads']}; prompts learned from: {learned}")
    for batch, ways in facts["computed"].items():
        say(f"computed, {batch}: {', '.join(f'{way} in {count} layers' for way, count in ways.items())}")
    moved = Counter(row["expert"] for row in facts["init"] if not row["ok"])
    rows = Counter(row["expert"] for row in facts["init"])
    if rows:
        changed = ", ".join(f"{name} {moved[name]}/{rows[name]}" for name in rows)
        say(f"A's spread differs from its initialisation, in layers: {changed} (trained experts do)")


def _print_routing(report: Report, routing: RoutingSummary, to: Console) -> None:
    from molora.evaluation.findings import warnings
    from molora.report.tables import matrix_table, routing_lines, routing_title

    title = routing_title(routing)
    to.print(matrix_table(routing.task_expert(), title, corner="task"))
    to.print(matrix_table(routing.layer_expert(), title.replace("task x", "layer x"), corner="layer"))
    shares = ", ".join(f"{name} {share:.3f}" for name, share in routing.shares().items())
    to.print(f"share of what the gates chose: {shares}", markup=False)
    told = routing_lines(routing, grown=bool(report.before))
    for line in told + [f"warning: {line}" for line in warnings(report) if line not in told]:
        to.print(line, markup=False)

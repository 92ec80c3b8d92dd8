"""`molora inspect`: what is in a trained run or adapter, and which expert does what."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.cli.options import AsJson, RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from molora.evaluation.routing import RoutingSummary


def command(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures; default: the run's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show parameters, experts, tasks, and which expert does what.

    Example: molora inspect runs/quickstart
    """
    from molora.evaluation.report import Report
    from molora.models.build import load_trained
    from molora.report.tables import console
    from molora.store.runs import Run
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        model, _, config = load_trained(run, trainable=True)
    facts = describe(model)
    folder = Run.find(run).path if config is not None else None
    stored = folder / "report.json" if folder is not None else None
    report = (
        Report.from_json(stored.read_text(encoding="utf-8"))
        if stored is not None and stored.is_file()
        else None
    )
    to = console()
    if as_json:
        routing = report.to_dict()["routing"] if report else None
        to.print(
            json.dumps({**facts, "routing": routing}, indent=2, ensure_ascii=False),
            markup=False,
            soft_wrap=True,
        )
        return
    _print_facts(facts, to)
    if report is None or report.routing is None:
        to.print("routing: not recorded here; `molora eval RUN` records it.", markup=False)
        return
    _print_routing(report.routing, to)
    pictures = out or folder
    assert pictures is not None
    pictures.mkdir(parents=True, exist_ok=True)
    for picture in _draw(report.routing, pictures):
        to.print(f"picture: {picture}", markup=False)


def describe(model: Any) -> dict[str, Any]:
    """Everything `inspect` knows without data: parameter counts, experts, tasks, initialisation."""
    from molora.forward.dispatch import ways_in_use
    from molora.training.optimizer import parameters_by_role
    from molora.tuner.parts import init_std_report

    roles = {role: sum(p.numel() for p in group) for role, group in parameters_by_role(model).items()}
    config = model.active_peft_config
    return {
        "parameters": {**roles, "all": sum(p.numel() for p in model.parameters())},
        "layers": len(model.base_model.targeted_module_names),
        "gate": {"scope": config.gate.scope, "select": config.gate.select, "share": config.gate.share},
        "experts": {
            name: "frozen" if name in config.frozen_experts else "trainable" for name in model.expert_names
        },
        "tasks": {
            name: {"id": model.task_ids[name], "experts": experts} for name, experts in model.tasks.items()
        },
        "router": _router(model),
        "computed": ways_in_use(model),
        "init": init_std_report(model),
    }


def _router(model: Any) -> dict[str, Any] | None:
    """The adapter's task router: its settings, and how many prompts of each task it learned from."""
    from dataclasses import asdict

    from molora.tuner.api import find_context

    found = find_context(model).adapters[str(model.active_adapter)]
    if found.router is None:
        return None
    counts = zip(found.router.ids, found.router.counts.tolist(), strict=True)
    learned = {found.task_map.name(task): int(count) for task, count in counts}
    return {**asdict(found.config.router), "learned": learned}


def _print_facts(facts: dict[str, Any], to: Console) -> None:
    counts = facts["parameters"]
    trainable = sum(n for role, n in counts.items() if role != "all")
    parts = ", ".join(f"{role} {n:,}" for role, n in counts.items() if n and role != "all")
    to.print(f"parameters: {counts['all']:,}, trainable {trainable:,} ({parts})", markup=False)
    to.print(
        f"layers: {facts['layers']}; gate: " + ", ".join(f"{k} {v}" for k, v in facts["gate"].items()),
        markup=False,
    )
    to.print(
        "experts: " + ", ".join(f"{name} ({state})" for name, state in facts["experts"].items()), markup=False
    )
    for name, task in facts["tasks"].items():
        experts = ", ".join(f"{expert} {weight:.2f}" for expert, weight in task["experts"].items())
        to.print(f"task {name} (id {task['id']}): {experts}", markup=False)
    if facts["router"] is not None:
        learned = ", ".join(f"{name} {count}" for name, count in facts["router"]["learned"].items())
        to.print(f"router: {facts['router']['kind']}; prompts learned from: {learned}", markup=False)
    for batch, ways in facts["computed"].items():
        counted = ", ".join(f"{way} in {count} layers" for way, count in ways.items())
        to.print(f"computed, {batch}: {counted}", markup=False)
    moved: Counter[str] = Counter(row["expert"] for row in facts["init"] if not row["ok"])
    rows: Counter[str] = Counter(row["expert"] for row in facts["init"])
    changed = ", ".join(f"{name} {moved[name]}/{rows[name]}" for name in rows)
    if rows:
        to.print(
            f"A's spread differs from its initialisation, in layers: {changed} (trained experts do)",
            markup=False,
        )


def _print_routing(routing: RoutingSummary, to: Console) -> None:
    from molora.evaluation.routing import advice
    from molora.report.tables import matrix_table, routing_title

    title = routing_title(routing)
    to.print(matrix_table(routing.task_expert(), title, corner="task"))
    to.print(matrix_table(routing.layer_expert(), title.replace("task x", "layer x"), corner="layer"))
    shares = ", ".join(f"{name} {share:.3f}" for name, share in routing.shares().items())
    to.print(f"share of what the gates chose: {shares}", markup=False)
    to.print(advice(routing.dead_experts(), mode=routing.mode) or "No dead experts.", markup=False)


def _draw(routing: RoutingSummary, folder: Path) -> list[Path]:
    from molora.training.evaluate import draw_routing

    return draw_routing(routing, folder)

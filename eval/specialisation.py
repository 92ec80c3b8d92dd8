"""Which gate shows who does what? The quickstart under several gates and losses; one JSON, arms added as they finish.

    python -m eval.specialisation            # every missing run; writes eval/results/specialisation.json and .md

An arm is the quickstart's recipe with another gate and other losses. Specialisation is that of
`molora.evaluation.routing.specialisation`: 0 where all tasks are split alike, 1 where each has an expert of its own.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from eval.bench.common import RESULTS, environment, quiet_process

ARMS: dict[str, list[str]] = {
    "top-2 of a token, balance 0.01": ["adapter.gate={kind: top_k, top_k: 2}", "adapter.aux_losses={balance: 0.01}"],
    "prompt, task_label 0.1": ["adapter.gate={kind: sequence}", "adapter.aux_losses={task_label: 0.1}"],
    "prompt, task_label 1": ["adapter.gate={kind: sequence}", "adapter.aux_losses={task_label: 1.0}"],
    "prompt, the best expert alone, task_label 0.1": [
        "adapter.gate={kind: sequence, select: hard}", "adapter.aux_losses={task_label: 0.1}",
    ],
    "prompt, top-1, task_label 0.1": [
        "adapter.gate={kind: sequence, select: top_k, top_k: 1}", "adapter.aux_losses={task_label: 0.1}",
    ],
}  # fmt: skip
RUNS = [
    *((arm, 0) for arm in ARMS),
    ("prompt, task_label 0.1", 1),
    ("prompt, task_label 1", 1),
]
TARGET = RESULTS / "specialisation.json"


def found_in(report: Any) -> dict[str, Any]:
    """What a run's report says: mean score with ids hidden and given, the lowest task, the weights."""
    scores = {mode: [s.value for s in report.scores if s.mode == mode] for mode in ("gate", "task")}
    return {
        "specialisation": report.routing.specialisation(),
        "hidden": statistics.fmean(scores["gate"]),
        "given": statistics.fmean(scores["task"]),
        "lowest given": min(scores["task"]),
        "weights": report.routing.by_task,
    }


def play(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed."""
    import molora
    from eval.cells import OF_FIRST_BASE
    from eval.quickstart_vs_lora import RECIPE
    from molora.config import load_recipe
    from molora.evaluation.report import Report

    with tempfile.TemporaryDirectory() as output:
        overrides = [*ARMS[arm], OF_FIRST_BASE, "adapter.router=null", f"seed={seed}", f"output={output}"]
        run = molora.train(load_recipe(RECIPE, overrides))
        return found_in(Report.from_json((run.path / "report.json").read_text(encoding="utf-8")))


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the runs there are."""
    lines = [
        "# Experts that specialise\n",
        "The quickstart (four tasks, four experts, 300 steps, version 1 of the base) under other gates and losses; exact "
        "match on 200 held-out items a task. "
        "With ids given a task has only the experts that are its own: one under `task_label`, all of them "
        "otherwise. Made by `python -m eval.specialisation`.\n",
        "| gate reads, loss | seeds | specialisation | ids hidden | ids given | lowest task, given |",
        "|---|---|---|---|---|---|",
    ]
    for arm, seeds in results.items():
        shown = {key: statistics.fmean(run[key] for run in seeds.values()) for key in COLUMNS}
        apart, *shares = shown.values()
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {arm} | {len(seeds)} | {apart:.2f} | {cells} |")
    return "\n".join(lines) + "\n"


COLUMNS = ("specialisation", "hidden", "given", "lowest given")


def write(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The JSON and its page."""
    record = {"environment": environment(), "arms": ARMS, "results": results}
    TARGET.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    TARGET.with_suffix(".md").write_text(page(results), encoding="utf-8")


def main() -> None:
    """Run what is missing, and write after each run."""
    quiet_process()
    results: dict[str, dict[str, Any]] = {}
    if TARGET.is_file():
        results = json.loads(TARGET.read_text(encoding="utf-8"))["results"]
    for arm, seed in RUNS:
        if str(seed) not in results.setdefault(arm, {}):
            results[arm][str(seed)] = play(arm, seed)
            write({arm: seeds for arm, seeds in results.items() if seeds})
    print(page(results))


if __name__ == "__main__":
    main()

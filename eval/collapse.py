"""Measures routing collapse and its remedies: one task mixture, trained without a remedy and with several.

    python -m eval.collapse                # all arms, two seeds; writes eval/results/collapse.json and collapse.md
    python -m eval.collapse --quick OUT    # two arms, few steps, into the folder OUT

An expert's share is its part of the slots, averaged over gates; even is 1/E. Collapse: some share below 0.5/E.
The worst gate is the gate whose least used expert has the smallest share.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from eval.bench.common import RESULTS, environment, quiet_process
from eval.cells import FIRST_BASE

EXPERTS = 8
GATE: dict[str, Any] = {"kind": "top_k", "top_k": 1, "share": "group"}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "balance 0.1": {"aux_losses": {"balance": 0.1}},
    "balance 1": {"aux_losses": {"balance": 1.0}},
    "loss-free 0.003": {"gate": {"balance_rate": 0.003}},
    "loss-free 0.01": {"gate": {"balance_rate": 0.01}},
}


def recipe(arm: str, seed: int, steps: int, output: str) -> dict[str, Any]:
    """The quickstart's tasks under one remedy."""
    change = ARMS[arm]
    tasks = {
        name: {"source": "synthetic", "generator": name, "train_size": 4000, "eval_size": 100}
        for name in ("pig", "mirror", "zigzag", "back")
    }
    return {
        "name": "collapse",
        "seed": seed,
        "base": FIRST_BASE,
        "output": output,
        "adapter": {
            "num_experts": EXPERTS,
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "gate": {**GATE, **change.get("gate", {})},
            "aux_losses": change.get("aux_losses", {}),
        },
        "data": {"max_length": 64, "mixing": "equal", "tasks": tasks},
        "train": {"max_steps": steps, "batch_size": 32, "lr": 5.0e-3, "schedule": "cosine", "warmup": 0.05},
        "eval": {"batch_size": 100, "max_new_tokens": 20, "modes": ["gate"]},
    }


def run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm and read its routing over held-out items."""
    import molora
    from molora.evaluation.report import Report

    with tempfile.TemporaryDirectory() as output:
        done = molora.train(recipe(arm, seed, steps, output))
        report = Report.from_json((done.path / "report.json").read_text(encoding="utf-8"))
    assert report.routing is not None
    shares = list(report.routing.shares().values())
    gates: dict[str, list[float]] = {}
    for row in report.routing.gates:
        gates.setdefault(row["gate"], []).append(row["share"])
    entropy = -sum(s * math.log(s) for s in shares if s) / math.log(EXPERTS)
    return {
        "shares": [round(share, 4) for share in shares],
        "least": min(shares),
        "least_in_worst_gate": min(min(values) for values in gates.values()),
        "gates_collapsed": sum(min(values) < 0.5 / EXPERTS for values in gates.values()) / len(gates),
        "entropy_of_shares": entropy,
        "dead": len(report.routing.dead_experts()),
        "exact_match": statistics.mean(score.value for score in report.scores),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line per arm, means over seeds."""
    lines = [
        "| remedy | least share x E | all above 0.5/E | least share x E in the worst gate | gates with one below 0.5/E "
        "| exact match |",
        "|---|---|---|---|---|---|",
    ]
    for arm, seeds in results.items():
        runs = list(seeds.values())
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "shares"}
        above = all(run["least"] > 0.5 / EXPERTS for run in runs)
        lines.append(
            f"| {arm} | {mean['least'] * EXPERTS:.2f} | {'yes' if above else 'no'} "
            f"| {mean['least_in_worst_gate'] * EXPERTS:.2f} | {100 * mean['gates_collapsed']:.0f} % "
            f"| {100 * mean['exact_match']:.1f} % |"
        )
    return "\n".join(lines)


def page(results: dict[str, dict[str, Any]], steps: int, seeds: int) -> str:
    """The table, with the settings behind it."""
    return (
        "# Routing collapse and its cures\n\n"
        f"Four tasks in one mixture of {EXPERTS} experts on version 1 of the embedded base, top-{GATE['top_k']}, one gate per "
        f"{GATE['share']}; {steps} steps, {seeds} seeds. Shares are measured "
        "on held-out items without task ids; 1.00 is an even share. Made by `python -m eval.collapse`.\n\n"
        f"{table(results)}\n"
    )


def main() -> None:
    """Run the arms and write their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", metavar="OUT", help="two arms, few steps, into this folder")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    quiet_process()
    out, steps, seeds, arms = RESULTS, given.steps, given.seeds, list(ARMS)
    if given.quick:
        out, steps, seeds, arms = Path(given.quick), 4, 1, ["none", "balance 1"]
    results: dict[str, dict[str, Any]] = {}
    for arm in arms:
        results[arm] = {str(seed): run(arm, seed, steps) for seed in range(seeds)}
        print(f"{arm}: {results[arm]}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"experts": EXPERTS, "gate": GATE, "steps": steps, "arms": {arm: ARMS[arm] for arm in arms}}
    record = {"environment": environment(), "settings": settings, "results": results}
    (out / "collapse.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "collapse.md").write_text(page(results, steps, seeds), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

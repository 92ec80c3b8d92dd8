"""Checks this package on a CUDA device in under nine minutes: precision, memory, speed, both trainers.

    python -m eval.gpu_check                        every stage, within --budget seconds
    python -m eval.gpu_check --device cpu --quick   the same code on tiny models, where no GPU is at hand

Everything is built from configs; nothing is downloaded. Writes eval/results/gpu_check.json after every stage, so
a run that is cut off keeps what it has; a stage that no longer fits into the budget is listed as skipped. Exit
code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval import gpu_stages as stages
from eval.bench import common

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    """What a run is about."""

    device: str
    quick: bool
    scratch: Path


@dataclass
class Report:
    """Results by stage, and one line per check."""

    path: Path
    device: str
    stages: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write what there is."""
        found = {"stages": self.stages, "checks": self.checks, "skipped": self.skipped}
        common.write("gpu_check", found, device=self.device, path=self.path)


Stage = Callable[[Settings], tuple[dict[str, Any], dict[str, bool]]]


def precision(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """200 steps in every precision against float32."""
    steps = 20 if settings.quick else 200
    found = stages.precision_runs(settings.device, steps, quick=settings.quick)
    return found, stages.judge_precision(found, steps)


def memory(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """Peak memory of a training step."""
    if settings.device == "cpu":
        return {"not measured": "no peak counter on this device"}, {}
    found = stages.peak_memory(settings.quick)
    plain = found["plain"]
    return found, {
        "peak memory <= 1.02 x PEFT LoRA r=8": plain["molora, gate per group"]
        <= 1.02 * plain["PEFT LoRA r=8"]
    }


def gemms(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """Bandwidth of the skinny products over that of a copy."""
    return stages.skinny_gemms(settings.device, quick=settings.quick), {}


def step(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """Training step ratios, eager."""
    return _bench(settings, "step", "1B bf16", [] if settings.quick else ["--rounds", "7"])


def compiled_step(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """Training step ratios, compiled."""
    shape = "model quick" if settings.quick else "1B bf16"
    return _bench(settings, "step", shape, ["--compile", "--rounds", "7"])


def decode(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """Decoding ratios."""
    return _bench(settings, "decode", "1B bf16", ["--rounds", "15"])


def lightning(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """The quickstart by Lightning, mixed precision."""
    found = stages.lightning_runs(settings.device, settings.scratch, steps=4 if settings.quick else 40)
    return found, {
        f"lightning {k}: finite, gate float32": v["finite"] and v["float32"] for k, v in found.items()
    }


def hf_trainer(settings: Settings) -> tuple[dict[str, Any], dict[str, bool]]:
    """The stock Trainer, mixed precision."""
    found = stages.trainer_runs(settings.device, settings.scratch, steps=3 if settings.quick else 30)
    return found, {
        f"Trainer {k}: finite, gate float32": v["finite"] and v["float32"] for k, v in found.items()
    }


# Name -> the stage and the seconds it may take on a GPU; dear ones last, so that little is lost when time is short.
STAGES: dict[str, tuple[Stage, int]] = {
    "gemms": (gemms, 20),
    "precision": (precision, 120),
    "trainer": (hf_trainer, 40),
    "lightning": (lightning, 60),
    "memory": (memory, 40),
    "decode": (decode, 60),
    "step": (step, 90),
    "compiled step": (compiled_step, 150),
}


def _bench(
    settings: Settings, script: str, shape: str, arguments: list[str]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """One of eval/bench in a process of its own: its figures, and its bars as checks."""
    path = settings.scratch / f"{script}{len(arguments)}.json"
    command = [
        sys.executable,
        "-m",
        f"eval.bench.{script}",
        "--device",
        settings.device,
        "--output",
        str(path),
    ]
    command += ["--quick"] * settings.quick + arguments
    if not settings.quick or shape.endswith("quick"):
        command += ["--shapes", shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    shapes = json.loads(path.read_text())["shapes"]
    if settings.device == "cpu":  # the bars are those of a GPU
        return shapes, {}
    return shapes, {
        f"{name}: {bar}": verdict["met"]
        for name, row in shapes.items()
        for bar, verdict in row["bars"].items()
    }


def run(settings: Settings, report: Report, budget: float, wanted: list[str]) -> None:
    """Run the stages in order while the budget lasts."""
    start = time.perf_counter()
    for name in wanted:
        stage, seconds = STAGES[name]
        left = budget - (time.perf_counter() - start)
        if left < seconds:
            report.skipped[name] = f"needs about {seconds} s, {left:.0f} s left"
            continue
        began = time.perf_counter()
        try:
            found, checks = stage(settings)
        except Exception:  # noqa: BLE001 - the other stages still tell something
            found, checks = {"error": traceback.format_exc()[-2000:]}, {f"{name} runs": False}
        report.stages[name] = {"seconds": round(time.perf_counter() - began, 1), **found}
        report.checks |= checks
        report.write()
        print(f"{name}: {report.stages[name]['seconds']} s", flush=True)
        for check, passed in checks.items():
            print(f"  {'ok    ' if passed else 'FAILED'} {check}", flush=True)


def main() -> None:
    """Run and say whether all checks passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=530, help="seconds")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gpu_check.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --quick runs the same code on tiny models.")
    report = Report(options.output, options.device)
    with tempfile.TemporaryDirectory() as scratch:
        run(Settings(options.device, options.quick, Path(scratch)), report, options.budget, options.stages)
    report.write()
    for name, reason in report.skipped.items():
        print(f"{name}: skipped, {reason}")
    failed = [check for check, passed in report.checks.items() if not passed]
    print(f"{len(report.checks) - len(failed)} checks passed, {len(failed)} failed; {options.output}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Checks this package on a CUDA device in under nine minutes: precision, memory, speed, both trainers.

    python -m eval.gpu_check                             every stage, within --budget seconds
    python -m eval.gpu_check --stages step decode        some of them
    python -m eval.gpu_check --device cpu --quick        the same code on tiny models, where no GPU is at hand

Everything is built from configs; nothing is downloaded. Writes eval/results/gpu_check.json after every stage, so
a run that is cut off keeps what it has; a stage that no longer fits into the budget is listed as skipped, with the
reason. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import gc
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

from eval import gpu_precision, gpu_stages
from eval.bench import common

ROOT = Path(__file__).parents[1]
Found = tuple[dict[str, Any], dict[str, bool]]  # figures, and checks by name


@dataclass(frozen=True)
class Settings:
    """Settings of a run, and when it must end."""

    device: str
    quick: bool
    scratch: Path
    deadline: float  # on time.perf_counter()

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()


@dataclass
class Report:
    """Figures by stage, a verdict per check, and a reason per skipped stage."""

    path: Path
    device: str
    stages: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, bool]] = field(default_factory=dict)  # by stage
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Replace the file atomically with what there is so far."""
        found = {"stages": self.stages, "checks": self.checks, "skipped": self.skipped}
        partial = common.write(
            "gpu_check", found, device=self.device, path=self.path.with_suffix(".json.part")
        )
        partial.replace(self.path)

    @property
    def failed(self) -> list[str]:
        return [
            f"{stage}: {check}" for stage, row in self.checks.items() for check, ok in row.items() if not ok
        ]

    def summary(self) -> str:
        """One line per stage, then one per skipped part and failed check."""
        rows = {
            stage: {
                "seconds": found["seconds"],
                "checks": len(self.checks[stage]),
                "failed": sum(not ok for ok in self.checks[stage].values()),
            }
            for stage, found in self.stages.items()
        }
        lines = [common.table(rows)] if rows else []
        lines += [f"skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, *(f"FAILED   {name}" for name in self.failed)])


def environment(settings: Settings) -> Found:
    """The device."""
    return gpu_stages.facts(settings.device), {}


def gemms(settings: Settings) -> Found:
    """Bandwidth of the skinny products over that of a copy."""
    return gpu_stages.skinny_gemms(settings.device, quick=settings.quick), {}


def precision(settings: Settings) -> Found:
    """200 steps in every precision against float32."""
    steps = 20 if settings.quick else 200
    found = gpu_precision.precision_runs(settings.device, steps, quick=settings.quick)
    return found, gpu_precision.judge_precision(found)


def hf_trainer(settings: Settings) -> Found:
    """transformers' Trainer, mixed precision."""
    found = gpu_stages.trainer_runs(settings.device, settings.scratch, steps=3 if settings.quick else 30)
    scaled = {name: row["scale"] for name, row in found.items() if row["scale"] is not None}
    return found, _sound(found) | {
        f"{name}: at most {gpu_precision.MOST_SKIPPED} steps skipped": scale >= gpu_precision.LEAST_SCALE
        for name, scale in scaled.items()
    }


def lightning(settings: Settings) -> Found:
    """The quickstart by Lightning, mixed precision."""
    found = gpu_stages.lightning_runs(settings.device, settings.scratch, steps=4 if settings.quick else 40)
    return found, _sound(found)


def memory(settings: Settings) -> Found:
    """Peak memory of a training step."""
    found = gpu_stages.memory_table(settings.device, quick=settings.quick)
    return found, gpu_stages.judge_memory(found)


def decode(settings: Settings) -> Found:
    """Decoding ratios, eager."""
    return _bench(settings, "decode", "1B bf16", "--rounds", "15")


def step(settings: Settings) -> Found:
    """Training step ratios, eager."""
    return _bench(settings, "step", "1B bf16", "--rounds", "7")


def mixed(settings: Settings) -> Found:
    """A task for each sample, by the number of experts."""
    return _bench(settings, "mixed", "1B bf16", "--rounds", "7", "--experts", "8", "64")


def ways(settings: Settings) -> Found:
    """The three ways to compute a top-2 mixture, by the number of experts."""
    return gpu_stages.ways_by_experts(settings.device, quick=settings.quick), {}


def compiled_step(settings: Settings) -> Found:
    """Training step ratios, compiled."""
    shape = "model quick" if settings.quick else "1B bf16"
    return _bench(settings, "step", shape, "--rounds", "7", "--compile")


def compiled_decode(settings: Settings) -> Found:
    """Decoding ratios, compiled."""
    shape = "quick" if settings.quick else "1B bf16"
    return _bench(settings, "decode", shape, "--rounds", "15", "--compile")


# Name -> the stage and the seconds it may take on a GPU; expensive ones last, so that little is lost when time is short.
STAGES: dict[str, tuple[Callable[[Settings], Found], int]] = {
    "environment": (environment, 5),
    "gemms": (gemms, 20),
    "precision": (precision, 120),
    "trainer": (hf_trainer, 40),
    "lightning": (lightning, 60),
    "memory": (memory, 40),
    "decode": (decode, 60),
    "step": (step, 90),
    "mixed": (mixed, 60),
    "ways": (ways, 30),
    "compiled step": (compiled_step, 120),
    "compiled decode": (compiled_decode, 120),
}


def _sound(found: dict[str, Any]) -> dict[str, bool]:
    return {
        f"{name}: {check}": row[key]
        for name, row in found.items()
        for check, key in (("all finite", "finite"), ("what is trained is float32", "float32"))
    }


def _bench(settings: Settings, script: str, shape: str, *arguments: str) -> Found:
    """Run one of eval/bench in its own process within the remaining budget: its figures, and its bars as checks."""
    path = settings.scratch / f"{'_'.join((script, *arguments))}.json"
    command = [sys.executable, "-m", f"eval.bench.{script}", "--device", settings.device]
    command += ["--output", str(path), *arguments]
    if settings.quick:
        command.append("--quick")
    if not settings.quick or shape.endswith("quick"):  # otherwise all quick shapes
        command += ["--shapes", shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, settings.left))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    shapes = json.loads(path.read_text())["shapes"]
    if settings.quick:  # the bars are those of large models
        return shapes, {}
    return shapes, {
        f"{name}: {bar}": verdict["met"]
        for name, row in shapes.items()
        for bar, verdict in row["bars"].items()
    }


def run(settings: Settings, report: Report, wanted: list[str]) -> None:
    """Run the stages in order while the budget lasts."""
    for name in wanted:
        stage, seconds = STAGES[name]
        if settings.left < seconds:
            report.skipped[name] = f"needs about {seconds} s, {max(0.0, settings.left):.0f} s left"
            continue
        began = time.perf_counter()
        try:
            found, checks = stage(settings)
        except subprocess.TimeoutExpired as cut:
            report.skipped[name] = f"cut off after {cut.timeout:.0f} s, the end of the budget"
            continue
        except Exception:  # noqa: BLE001 - the other stages are still informative
            found, checks = {"error": traceback.format_exc()[-2000:]}, {"runs": False}
        report.stages[name] = {"seconds": round(time.perf_counter() - began, 1), **found}
        report.checks[name] = checks
        for part, row in found.items():
            if isinstance(row, dict) and "skipped" in row:
                report.skipped[f"{name}, {part}"] = row["skipped"]
        report.write()
        print(f"{name}: {report.stages[name]['seconds']} s", flush=True)
        for check, passed in checks.items():
            print(f"  {'ok    ' if passed else 'FAILED'} {check}", flush=True)
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()  # the benchmarks are processes of their own, and need the room


def main() -> None:
    """Run and say whether all checks passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages (default: 540)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gpu_check.json")
    options = parser.parse_args()
    deadline = time.perf_counter() + options.budget
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --quick runs the same code on tiny models.")
    if options.device == "cpu" and not options.quick:
        raise SystemExit("the full sizes are those of a GPU; on a CPU give --quick.")
    report = Report(options.output, options.device)
    with tempfile.TemporaryDirectory() as scratch:
        run(Settings(options.device, options.quick, Path(scratch), deadline), report, options.stages)
    report.write()
    count = sum(map(len, report.checks.values()))
    print(f"\n{report.summary()}\n\n{count - len(report.failed)} of {count} checks passed; {options.output}")
    raise SystemExit(1 if report.failed else 0)


if __name__ == "__main__":
    main()

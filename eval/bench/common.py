"""What every benchmark shares: a quiet process, interleaved rounds, ratios, models from configs, one JSON.

A ratio is the median over rounds of (time of one case / time of another in the same round), so drift of the
machine cancels. On a CPU the clock is the process's CPU time on one thread; on CUDA, events on the stream.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"

_QUIET = {
    # glibc hands large buffers back to the system and faults them in again: a linear layer takes 3 x as long.
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TOKENIZERS_PARALLELISM": "false",
}


def quiet_process(threads: int = 1) -> None:
    """Start this script again with the allocator and thread settings that timings need. Call it first."""
    wanted = {**_QUIET, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # orig_argv, not argv: it keeps `-m package.module` and the interpreter's own flags.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def interleaved(
    cases: Mapping[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of every case in every round; the cases take turns, in an order that rotates."""
    for _ in range(warmup):
        for run in cases.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(_milliseconds(cases[name], device))
    finally:
        gc.enable()
    return times


def _milliseconds(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        run()
        return (time.process_time() - start) * 1e3
    import torch

    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def ratio(times: Mapping[str, Sequence[float]], case: str, over: str) -> dict[str, float]:
    """Median of the per-round ratios of two cases, with its quartiles."""
    rounds = sorted(a / b for a, b in zip(times[case], times[over], strict=True))
    low, middle, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else rounds * 3
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def ratios(times: Mapping[str, Sequence[float]], over: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per case: median milliseconds, and its ratio over each of the cases named in `over`."""
    return {
        name: {
            "ms": round(statistics.median(values), 3),
            **{f"over {peer}": ratio(times, name, peer) for peer in over if peer in times},
        }
        for name, values in times.items()
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of `ratios` (or any mapping of mappings) as aligned text."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            value = value["median"]
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [["", *columns]]
    lines += [[name, *(cell(row[c]) if c in row else "" for c in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(part.ljust(w) if i == 0 else part.rjust(w) for i, (part, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )  # fmt: skip


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine, threads and versions, which every figure depends on."""
    import torch

    found: dict[str, Any] = {
        "machine": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_bf16" in _cpu_flags(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in ("molora", "torch", "peft", "transformers"):
        found[package] = metadata.version(package)
    if device != "cpu":
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def write(
    name: str, result: Mapping[str, Any], *, device: str = "cpu", path: str | Path | None = None
) -> Path:
    """Write `result` with the environment to eval/results/<name>.json, or to `path`."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, "environment": environment(device), **result}, indent=1)
    target.write_text(text + "\n")
    return target

"""Times data-parallel training in two processes against one: a mixture, and one LoRA of as many parameters.

    python -m eval.bench.ddp

Each process has one thread and a batch of its own (weak scaling): perfect is a step as long as that of a single
process that runs alone. Gradients are reduced by gloo. Wall time, since waiting is what we measure: median of
the steps, the slower process counts; single and double take turns, as processes of their own. Two cores share their
memory bandwidth, so a frozen base alone, which exchanges nothing, is measured as well. Writes eval/results/ddp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from eval.bench import common, peers
from eval.bench.peers import BASE, CASES, MOLORA, PEFT_WIDE, Size
from eval.bench.step import training_step

ROOT = Path(__file__).parents[2]
NAMES = (BASE, PEFT_WIDE, MOLORA)
SIZE, SAMPLES, SEQ = Size(4, 512), 2, 512
QUICK_SIZE, QUICK_SEQ = Size(1, 64, vocab=64), 8


def worker(name: str, steps: int, quick: bool) -> dict[str, Any]:
    """Median step of this process, in seconds, and the bytes of its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = peers.frozen_base(QUICK_SIZE if quick else SIZE, torch.float32)
    model = CASES[name](base, None)
    inputs = peers.batch(base, SAMPLES, QUICK_SEQ if quick else SEQ)
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = training_step(DistributedDataParallel(model) if trainable else model, inputs)
    times = []
    for i in range(steps + 2):
        dist.barrier()
        start = time.perf_counter()
        step()
        if i >= 2:
            times.append(time.perf_counter() - start)
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    # It holds the group. Freed after this function, the group would join its threads with the interpreter's lock
    # held, which they need to free the last reduction: now and then neither goes on.
    del step
    dist.destroy_process_group()
    return {
        "s": slowest.median().item(),
        "gradient bytes": sum(p.numel() * p.element_size() for p in trainable),
    }


def run(name: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start the workers of one case; what the first of them reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "eval.bench.ddp", "--worker", name, "--steps", str(options.steps)]
    command += ["--quick"] * options.quick
    started = []
    for rank in range(processes):
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):  # the others would wait for it forever
            for process in started:
                process.kill()
        time.sleep(0.1)
    if any(process.returncode for process in started):
        raise SystemExit(f"a worker of {name!r} failed")
    return json.loads(started[0].communicate()[0].splitlines()[-1])


def main() -> None:
    """Measure and write; with --worker, be one of the processes."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options.steps, options.quick)))
        return
    if options.quick:
        options.rounds, options.steps = 1, 2
    rows: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        pairs = [(run(name, 1, options), run(name, 2, options)) for _ in range(options.rounds)]
        rows[name] = {
            "one process, ms": round(statistics.median(one["s"] for one, _ in pairs) * 1e3, 1),
            "two processes, ms": round(statistics.median(two["s"] for _, two in pairs) * 1e3, 1),
            "efficiency": round(statistics.median(one["s"] / two["s"] for one, two in pairs), 3),
            "gradient bytes": pairs[0][0]["gradient bytes"],
        }
    print(common.table(rows))
    common.write("ddp", {"rounds": options.rounds, "cases": rows}, path=options.output)


if __name__ == "__main__":
    main()

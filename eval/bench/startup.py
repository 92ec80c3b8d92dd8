"""Times what happens before the first step: imports, the command line, wrapping a model, saving and loading.

    python -m eval.bench.startup

Imports and commands run in new processes, warm file cache, median of several. Wrapping, saving and loading are
timed on a small Llama with 224 adapted linears (32 layers of 7), against PEFT's LoRA. Writes eval/results/startup.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from eval.bench import common, peers
from eval.bench.peers import Size
from molora import MoLoraConfig

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "python": ["-c", "pass"],
    "import molora": ["-c", "import molora"],
    "import torch": ["-c", "import torch"],
    "import peft": ["-c", "import peft"],
    "import molora, peft": ["-c", "import molora, peft"],
    "molora --help": ["-m", "molora.cli.main", "--help"],
    "molora validate recipes/quickstart.yaml": ["-m", "molora.cli.main", "validate", "recipes/quickstart.yaml"],
}  # fmt: skip


def commands(rounds: int) -> dict[str, dict[str, float]]:
    """Median wall seconds of each command in a new process; the commands take turns."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            if turn:  # the first round warms the file cache
                times[name].append(time.perf_counter() - start)
    return {name: {"s": round(statistics.median(values), 3)} for name, values in times.items()}


def adapters(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds to wrap, save and load, for this package and for PEFT's LoRA."""
    base = peers.frozen_base(size, torch.float32)
    targets = peers.targets(base)
    kind: Any = "CAUSAL_LM"
    configs = {
        "PEFT LoRA r=64": lambda: LoraConfig(r=64, target_modules=targets, task_type=kind),
        "molora E=8 r=8": lambda: MoLoraConfig(num_experts=8, r=8, target_modules=targets, task_type=kind),
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in configs}
    for _ in range(rounds):
        for name, config in configs.items():
            with tempfile.TemporaryDirectory() as folder:
                _round(base, config, folder, times[name])
    return {
        name: {what: round(statistics.median(values), 3) for what, values in found.items()}
        for name, found in times.items()
    }


def _round(base: nn.Module, config: Callable[[], Any], folder: str, times: dict[str, list[float]]) -> None:
    mine, other, settings = peers.share(base), peers.share(base), config()

    def timed(what: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        times.setdefault(what, []).append(time.perf_counter() - start)
        return result

    model = timed("wrap s", lambda: get_peft_model(mine, settings))
    timed("save s", lambda: model.save_pretrained(folder, save_embedding_layers=False))
    timed("load s", lambda: PeftModel.from_pretrained(other, folder))


def main() -> None:
    """Measure and write."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round, two layers")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    rounds, layers = (1, 2) if options.quick else (options.rounds, 32)
    result = {
        "rounds": rounds,
        "processes": commands(rounds),
        "adapters": {"linears": 7 * layers, **adapters(Size(layers, 64, vocab=64), rounds)},
    }
    print(common.table(result["processes"]))
    print(common.table({k: v for k, v in result["adapters"].items() if k != "linears"}))
    common.write("startup", result, path=options.output)


if __name__ == "__main__":
    main()

"""Times two checkouts of molora against each other, by turns: whether a change made it slower.

    git worktree add ../before COMMIT
    python -m eval.bench.checkouts ../before .

Each checkout has a process of its own, which builds the same model on the same weights: a Llama of 8 blocks, 512 wide, float32,
eight experts of rank 8 on all linears. The processes take turns, so that only one computes at a time. "decode": ten steps of one
token; "prefill": a forward of 4 x 64 tokens; "step": forward and backward of them. Under a top-2 gate, and under a task gate
with one task. "saved" counts the bytes that a forward keeps for its backward pass, without Parameters. Printed is the second
checkout over the first, the median of the rounds' ratios with quartiles; written to eval/results/checkouts.json.

What a checkout's process runs uses nothing of `eval`, and of molora only what every version has: it has to run in old ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GATES = ("top-2", "task")
KINDS = ("decode", "prefill", "step")
STEPS, PROMPT, SAMPLES, SEQ = 10, 32, 4, 64


def model_of(gate: str, width: int) -> Any:
    """The mixture on a base from a config, B random."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from molora import GateConfig, MoLoraConfig

    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": width // 64}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=8, **size))
    tasks = {f"task_{i}": [f"expert_{i}"] for i in range(8)} if gate == "task" else None
    config = MoLoraConfig(
        num_experts=8, r=8, lora_alpha=16, target_modules="all-linear", tasks=tasks, task_type="CAUSAL_LM",
        gate=GateConfig(scope="task") if gate == "task" else GateConfig(top_k=2),
    )  # fmt: skip
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("_B"):
                parameter.normal_(std=0.02)
    return model


def runs_of(gate: str, width: int) -> dict[str, Callable[[], Any]]:
    """By kind, what is timed; and "saved", which returns bytes."""
    import torch
    from transformers import DynamicCache

    model = model_of(gate, width)
    given = {"routing_task_ids": "task_0"} if gate == "task" else {}
    ids = torch.randint(1024, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids[:1, :PROMPT], past_key_values=cache, use_cache=True, **given)

    def decode() -> None:
        model.eval()
        with torch.no_grad():
            for _ in range(STEPS):
                model(input_ids=ids[:1, :1], past_key_values=cache, use_cache=True, **given)
        cache.crop(-STEPS)

    def prefill() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, **given)

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=ids, **given).loss.backward()
        model.zero_grad()

    def saved() -> int:
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()
            loss = model(input_ids=ids, labels=ids, **given).loss
        del loss
        return sum(found.values())

    return {"decode": decode, "prefill": prefill, "step": step, "saved": saved}


def serve(width: int) -> None:
    """A checkout's process: reads a gate and a kind, answers with milliseconds of CPU time, or bytes."""
    runs = {gate: runs_of(gate, width) for gate in GATES}
    for line in sys.stdin:
        gate, kind = line.split()
        start = time.process_time()
        found = runs[gate][kind]()
        print(found if kind == "saved" else (time.process_time() - start) * 1e3, flush=True)


class Checkout:
    """The process of one checkout."""

    def __init__(self, folder: Path, width: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", str(width)], env=environment, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, gate: str, kind: str) -> float:
        """Milliseconds, or bytes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{gate} {kind}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    """Compare the two, and write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs=2, type=Path, help="folders: before, after")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    for folder in options.checkouts:
        if not (folder / "molora" / "__init__.py").is_file():
            parser.error(f"{folder} is no checkout of molora: there is no {folder / 'molora'} package.")
    width, rounds = (64, 2) if options.quick else (512, options.rounds)
    from eval.bench import common

    common.quiet_process()
    pair = [Checkout(folder, width) for folder in options.checkouts]
    commits = [
        subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        for folder in options.checkouts
    ]  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for gate in GATES:
        before, after = (one.ask(gate, "saved") for one in pair)
        found[f"{gate}, saved"] = {"median": round(after / before, 4)}
        for kind in KINDS:
            for one in (*pair, *pair):
                one.ask(gate, kind)
            times: dict[str, list[float]] = {"before": [], "after": []}
            for turn in range(rounds):
                for i in (0, 1) if turn % 2 else (1, 0):
                    times["after" if i else "before"].append(pair[i].ask(gate, kind))
            found[f"{gate}, {kind}"] = common.ratio(times, "after", "before")
        print(json.dumps({name: ratio for name, ratio in found.items() if name.startswith(gate)}), flush=True)
    for one in pair:
        one.process.kill()
    result = {"checkouts": commits, "rounds": rounds, "after over before": found}
    common.write("checkouts", result, path=options.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        main()

"""Times prompts whose task the adapter's router names, over the same prompts with their task ids given.

    python -m eval.bench.naming
    python -m eval.bench.naming --rounds 21

A Llama with random weights, 8 experts of rank 8 behind a task gate, B random; 8 samples of 8 tasks. "one pass": experts sit
behind the block that the router reads; "two passes": on every block, so that the base alone reads the prompt up to there
first. "prefill": a forward over prompts of 64 tokens that begins a cache; "decode": steps of one token after it. Each is over
the same adapter with ids given. The cases take turns in one run. Writes eval/results/naming.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from eval.bench import common, peers
from eval.bench.peers import Size
from molora import GateConfig, MoLoraConfig
from molora.models.task_router import router_of

TASKS, SEQ, STEPS = 8, 64, 4
SHAPES = {"fp32 8 x 512": Size(8, 512), "fp32 6 x 768": Size(6, 768)}
QUICK = {"quick": Size(2, 64, vocab=64)}
GIVEN = {"one pass": "one pass, ids given", "two passes": "two passes, ids given"}
MODES = ("prefill", "decode")
BAR = 1.01  # one pass over ids given


def adapter(base: nn.Module, passes: int) -> nn.Module:
    """An expert for each task, and a router that has seen some features of each."""
    mine = peers.share(base)
    config = MoLoraConfig(
        num_experts=TASKS,
        r=peers.RANK,
        lora_alpha=peers.ALPHA,
        target_modules=peers.targets(mine),
        gate=GateConfig(scope="task"),
        tasks={f"task_{i}": [f"expert_{i}"] for i in range(TASKS)},
        router={"passes": passes, "depth": 0.5 if mine.config.num_hidden_layers < 3 else 1 / 3},
        task_type="CAUSAL_LM",
    )
    model = peers.ready(get_peft_model(mine, config, autocast_adapter_dtype=False), None).eval()
    d = mine.config.hidden_size
    router_of(model, "default").learn({i: [torch.randn(64, d) + i] for i in range(TASKS)})
    return model


def run_of(mode: str, model: nn.Module, base: nn.Module, *, given: bool) -> Callable[[], None]:
    """What is timed of a case."""
    ids: dict[str, Any] = {"routing_task_ids": [f"task_{i}" for i in range(TASKS)]} if given else {}
    torch.manual_seed(1)
    tokens = torch.randint(base.config.vocab_size, (TASKS, SEQ))
    cache: Any = DynamicCache()

    def prefill() -> None:
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True, **ids)

    def decode() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True, **ids)
        cache.crop(-STEPS)

    if mode == "decode":
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=cache, use_cache=True, **ids)
    return {"prefill": prefill, "decode": decode}[mode]


def measure(name: str, size: Size, rounds: int) -> dict[str, Any]:
    """Both modes of one shape; prints their tables and bars."""
    base = peers.frozen_base(size, torch.float32)
    models = {case: adapter(base, passes) for passes, case in enumerate(GIVEN, 1)}
    found = {}
    for mode in MODES:
        runs = {}
        for case, over in GIVEN.items():
            runs[over] = run_of(mode, models[case], base, given=True)
            runs[case] = run_of(mode, models[case], base, given=False)
        times = common.interleaved(runs, rounds=rounds)
        rows = common.ratios(times, tuple(GIVEN.values()))
        value = common.ratio(times, "one pass", GIVEN["one pass"])["median"]
        bars = {f"one pass / its ids given <= {BAR}": {"value": value, "met": value <= BAR}}
        print(f"\n{name}, {mode}\n{common.table(rows)}")
        for bar, verdict in bars.items():
            print(f"{'met' if verdict['met'] else 'MISSED'}: {bar}: {verdict['value']}", flush=True)
        found[mode] = {"cases": rows, "bars": bars}
    return {"rounds": rounds, **found}


def main() -> None:
    """Run all shapes and write the result."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two rounds")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    shapes, rounds = (QUICK, 2) if options.quick else (SHAPES, options.rounds)
    found = {name: measure(name, size, rounds) for name, size in shapes.items()}
    path = options.output or common.RESULTS / "naming.json"
    common.write("naming", {"shapes": found}, device="cpu", path=path)


if __name__ == "__main__":
    main()

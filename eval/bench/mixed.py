"""Times a batch in which every sample has its own task, by the number of experts, over one plain LoRA.

    python -m eval.bench.mixed
    python -m eval.bench.mixed --shapes "fp32 4 x 512" --experts 8 512

A Llama with random weights, all linears adapted, rank 8, B random; 16 samples of 64 tokens, sample i of task
i mod E. "infer": a forward; "train": forward and backward (an optimiser's step grows with the experts it owns, not with the
batch, and is left out); "decode": steps of one token for each sample after a prompt of 64. PEFT's mixed batch
(`adapter_names`, inference only) holds the 16 adapters the batch uses, whatever E: its cost does not depend on others.
The cases take turns in one run. Writes eval/results/mixed.json, one entry per shape and number of experts.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from eval.bench import common, peers
from eval.bench.peers import BASE, PEFT_SMALL, Size
from eval.bench.step import with_earlier
from molora import GateConfig, MoLoraConfig

BF16, FP32 = torch.bfloat16, torch.float32
SAMPLES, SEQ, STEPS = 16, 64, 4
MINE, PEFT_MIXED = "molora, 16 tasks", "PEFT, 16 adapters"
MODES = ("infer", "train", "decode")
BAR = {"infer": 1.05, "train": 1.05, "decode": 1.25}  # MINE over one plain LoRA


@dataclass(frozen=True)
class Shape:
    """A base and the dtype of all its weights."""

    size: Size
    dtype: torch.dtype


CPU_SHAPES = {
    "fp32 4 x 512": Shape(Size(4, 512), FP32),
    "fp32 2 x 1024": Shape(Size(2, 1024), FP32),
    "bf16 2 x 512": Shape(Size(2, 512), BF16),
}
CUDA_SHAPES = {"1B bf16": Shape(Size(16, 2048, ff=8192, heads=32, kv_heads=8), BF16)}
QUICK_SHAPES = {"quick": Shape(Size(1, 64, vocab=64), FP32)}


def mixture(base: nn.Module, experts: int) -> nn.Module:
    """A task for each expert."""
    mine = peers.share(base)
    config = MoLoraConfig(
        num_experts=experts,
        r=peers.RANK,
        lora_alpha=peers.ALPHA,
        target_modules=peers.targets(mine),
        gate=GateConfig(scope="task"),
        tasks={f"task_{i}": [f"expert_{i}"] for i in range(experts)},
        task_type="CAUSAL_LM",
    )
    return peers.ready(get_peft_model(mine, config, autocast_adapter_dtype=False), None)


def peft_mixed(base: nn.Module) -> nn.Module:
    """PEFT's LoRA with an adapter for each sample."""
    config = peers.lora_config(base, peers.RANK)
    model = get_peft_model(peers.share(base), config, adapter_name="adapter_0", autocast_adapter_dtype=False)
    for i in range(1, SAMPLES):
        model.add_adapter(f"adapter_{i}", config)
    return peers.ready(model, None).eval()


def tasks_of(experts: int) -> list[str]:
    """The task of each sample."""
    return [f"task_{i % experts}" for i in range(SAMPLES)]


def models_of(base: nn.Module, experts: int) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """The cases, and what says which sample has which task."""
    adapters = [f"adapter_{i % experts}" for i in range(SAMPLES)]
    return {
        BASE: (peers.share(base), {}),
        PEFT_SMALL: (peers.peft_lora(peers.RANK)(peers.share(base), None), {}),
        MINE: (mixture(base, experts), {"routing_task_ids": tasks_of(experts)}),
        PEFT_MIXED: (peft_mixed(base), {"adapter_names": adapters}),
    }


def run_of(mode: str, model: nn.Module, ids: Mapping[str, Any], base: nn.Module) -> Callable[[], None]:
    """What is timed of a case."""
    torch.manual_seed(1)
    inputs = peers.batch(base, SAMPLES, SEQ)
    parameters = [p for p in model.parameters() if p.requires_grad]
    cache: Any = DynamicCache()
    tokens = torch.randint(base.config.vocab_size, (SAMPLES, SEQ), device=inputs["inputs_embeds"].device)

    def infer() -> None:
        with torch.no_grad():
            model(**inputs, **ids)

    def train() -> None:
        model(**inputs, **ids).loss.backward()
        for tensor in (inputs["inputs_embeds"], *parameters):
            tensor.grad = None

    def decode() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True, **ids)
        cache.crop(-STEPS)

    model.train(mode == "train")
    if mode == "decode":
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=cache, use_cache=True, **ids)
    return {"infer": infer, "train": train, "decode": decode}[mode]


def measure(name: str, shape: Shape, experts: int, options: argparse.Namespace) -> dict[str, Any]:
    """All modes of one shape and number of experts; prints their tables and bars."""
    base = peers.frozen_base(shape.size, shape.dtype, options.device)
    models, found = models_of(base, experts), {}
    for mode in MODES:
        runs = {
            case: run_of(mode, model, ids, base)
            for case, (model, ids) in models.items()
            if not (mode == "train" and case == PEFT_MIXED)
        }
        times = common.interleaved(runs, rounds=options.rounds, device=options.device)
        rows = common.ratios(times, (BASE, PEFT_SMALL))
        value = rows[MINE][f"over {PEFT_SMALL}"]["median"]
        bars = {f"{MINE} / {PEFT_SMALL} <= {BAR[mode]}": {"value": value, "met": value <= BAR[mode]}}
        if PEFT_MIXED in times:
            value = common.ratio(times, MINE, PEFT_MIXED)["median"]
            bars[f"{MINE} / {PEFT_MIXED} <= 1"] = {"value": value, "met": value <= 1}
        print(f"\n{name}, {experts} experts, {mode}\n{common.table(rows)}")
        for bar, verdict in bars.items():
            print(f"{'met' if verdict['met'] else 'MISSED'}: {bar}: {verdict['value']}", flush=True)
        found[mode] = {"cases": rows, "bars": bars}
    return {"rounds": options.rounds, **found}


def main() -> None:
    """Run what is asked for, and write after each."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help="names of shapes; default: all of the device")
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 64, 256, 512])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two rounds")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    shapes = QUICK_SHAPES if options.quick else CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        options.rounds, options.experts = 2, options.experts[:2]
    if unknown := set(options.shapes or ()) - set(shapes):
        parser.error(f"unknown shapes {sorted(unknown)}; there are: {', '.join(shapes)}")
    name = "mixed" if options.device == "cpu" else "mixed_cuda"
    path = options.output or common.RESULTS / f"{name}.json"
    for shape in options.shapes or shapes:
        for experts in options.experts:
            found = {f"{shape}, {experts} experts": measure(shape, shapes[shape], experts, options)}
            gc.collect()
            merged = with_earlier(path, found, common.environment(options.device))
            common.write(name, {"shapes": merged}, device=options.device, path=path)


if __name__ == "__main__":
    main()

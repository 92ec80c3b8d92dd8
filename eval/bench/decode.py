"""Times one step of decoding with a key-value cache against the base and PEFT's LoRA, eager or compiled.

    python -m eval.bench.decode
    python -m eval.bench.decode --compile --shapes "fp32 8 x 512"

Llamas with random weights, all linears adapted, B random; a prompt of 32 tokens, then steps of one token for a
batch of 1 and of 8. "one task": the same eight experts, a task id that uses one of them, unmerged; "merged": that
expert in the base's weights. The cases of a shape take turns in one run. With --compile the cache is static and
the model is one graph for all steps. Writes eval/results/decode.json, one entry per shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache, StaticCache

import molora
from eval.bench import common, peers
from eval.bench.peers import BASE, LOOP, MOLORA, PEFT_SMALL, PEFT_WIDE, Size
from eval.bench.step import with_earlier
from molora import GateConfig, MoLoraConfig

BF16, FP32 = torch.bfloat16, torch.float32
PROMPT, STEPS = 32, 10
TASK_GATE, BY_TASK, MERGED = "molora, one task", "molora, one task of a learned gate", "molora, merged"
CASES = (BASE, PEFT_SMALL, PEFT_WIDE, LOOP, MOLORA, TASK_GATE, BY_TASK, MERGED)
COMPILED = (BASE, PEFT_SMALL, PEFT_WIDE, MOLORA, TASK_GATE)  # the loop breaks the graph in every layer
OVER = (BASE, PEFT_SMALL, PEFT_WIDE)


@dataclass(frozen=True)
class Shape:
    """A base, the dtype of its adapters (None: its own) and the batch."""

    size: Size
    dtype: torch.dtype
    adapters: torch.dtype | None = None
    batch: int = 1


_DEEP, _WIDE = Size(8, 512), Size(2, 2048)
_1B = Size(16, 2048, ff=8192, heads=32, kv_heads=8)
CPU_SHAPES = {
    "fp32 8 x 512": Shape(_DEEP, FP32),
    "fp32 8 x 512, batch 8": Shape(_DEEP, FP32, batch=8),
    "bf16 2 x 2048": Shape(_WIDE, BF16),
    "bf16 2 x 2048, fp32 adapters": Shape(_WIDE, BF16, FP32),
    "bf16 2 x 2048, batch 8": Shape(_WIDE, BF16, batch=8),
}
CUDA_SHAPES = {
    "1B bf16": Shape(_1B, BF16),
    "1B bf16, fp32 adapters": Shape(_1B, BF16, FP32),
    "1B bf16, batch 8": Shape(_1B, BF16, batch=8),
}
_TINY = Size(2, 64, vocab=64)
QUICK_SHAPES = {"quick": Shape(_TINY, FP32), "quick, batch 2": Shape(_TINY, BF16, FP32, 2)}


@dataclass(frozen=True)
class Bar:
    """`case` over `over` is at most `most` on the shapes whose name starts so."""

    start: str
    case: str
    over: str
    most: float

    def __str__(self) -> str:
        return f"{self.case} / {self.over} <= {self.most}"


BARS = (
    Bar("fp32", MOLORA, PEFT_WIDE, 1.05),
    Bar("bf16", MOLORA, PEFT_WIDE, 1.00),
    Bar("1B", MOLORA, PEFT_WIDE, 1.00),
    Bar("", TASK_GATE, PEFT_SMALL, 1.05),
    Bar("", BY_TASK, PEFT_SMALL, 1.05),
    Bar("", MERGED, BASE, 1.02),
)


def model_of(name: str, base: nn.Module, adapters: torch.dtype | None) -> nn.Module:
    """A case on the weights of a base, in evaluation mode."""
    mine = peers.share(base)
    if name in (MOLORA, TASK_GATE, BY_TASK, MERGED):
        config = MoLoraConfig(
            num_experts=peers.EXPERTS,
            r=peers.RANK,
            lora_alpha=peers.ALPHA,
            target_modules=peers.targets(mine),
            gate=GateConfig(scope="task") if name in (TASK_GATE, MERGED) else GateConfig(top_k=peers.TOP_K),
            tasks={f"task_{i}": [f"expert_{i}"] for i in range(peers.EXPERTS)},
            task_type="CAUSAL_LM",
        )
        model = peers.ready(get_peft_model(mine, config, autocast_adapter_dtype=False), adapters)
        if name == MERGED:
            model = model.merge_and_unload(task="task_0")
    else:
        model = peers.CASES[name](mine, adapters)
    return model.eval()


def steps_of(name: str, model: nn.Module, shape: Shape, *, compiled: bool) -> Callable[[], None]:
    """A run of `STEPS` decoding steps after the prompt, at the same positions each time."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    prompt, token = (
        torch.randint(model.config.vocab_size, (shape.batch, n), generator=generator).to(device)
        for n in (PROMPT, 1)
    )
    cache: Any = DynamicCache()
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def task() -> AbstractContextManager[Any]:
        if name not in (TASK_GATE, BY_TASK):
            return nullcontext()
        return molora.routing(model, task_ids="task_0", by="task")

    with torch.no_grad(), task():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)

    def run() -> None:
        with torch.no_grad(), task():
            for _ in range(STEPS):
                forward(input_ids=token, past_key_values=cache, use_cache=True)
        if compiled:
            for layer in cache.layers:
                layer.cumulative_length.fill_(PROMPT)
        else:
            cache.crop(-STEPS)

    return run


def run_shape(name: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape; print its table and bars."""
    torch.compiler.reset()
    base = peers.frozen_base(shape.size, shape.dtype, options.device)
    base.config.use_cache = True
    names = COMPILED if options.compile else CASES
    runs = {
        case: steps_of(case, model_of(case, base, shape.adapters), shape, compiled=options.compile)
        for case in names
    }
    times = common.interleaved(runs, rounds=options.rounds, warmup=3, device=options.device)
    rows = common.ratios(times, OVER)
    for row in rows.values():
        row["tokens/s"] = round(shape.batch * STEPS / row["ms"] * 1e3, 1)
    print(f"\n{name}{' compiled' * options.compile}\n{common.table(rows)}")
    bars = {} if options.compile else judge(name, times)
    for bar, (value, met) in bars.items():
        print(f"{'met' if met else 'MISSED'}: {bar}: {value}")
    return {
        "steps": STEPS,
        "rounds": options.rounds,
        "cases": rows,
        "bars": {bar: {"value": value, "met": met} for bar, (value, met) in bars.items()},
    }


def judge(shape: str, times: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, bool]]:
    """Value and verdict of every bar that holds for a shape."""
    return {
        str(bar): (value := common.ratio(times, bar.case, bar.over)["median"], value <= bar.most)
        for bar in BARS
        if shape.startswith(bar.start)
    }


def main() -> None:
    """Run the shapes asked for, and write after each."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help="names of shapes; default: all of the device")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile; results go under '... compiled'")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    shapes = QUICK_SHAPES if options.quick else CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        options.rounds = 2
    if unknown := set(options.shapes or ()) - set(shapes):
        parser.error(f"unknown shapes {sorted(unknown)}; there are: {', '.join(shapes)}")
    name = "decode" if options.device == "cpu" else "decode_cuda"
    path = options.output or common.RESULTS / f"{name}.json"
    for shape in options.shapes or shapes:
        key = f"{shape} compiled" if options.compile else shape
        found = {key: run_shape(shape, shapes[shape], options)}
        merged = with_earlier(path, found, common.environment(options.device))
        common.write(name, {"shapes": merged}, device=options.device, path=path)


if __name__ == "__main__":
    main()

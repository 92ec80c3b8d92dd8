"""Times a training step of this package, of the frozen base, and of other methods on the same base.

    python -m eval.bench.step                                  all shapes of the CPU
    python -m eval.bench.step --shapes "55M bf16" --rounds 9   one of them; the others stay in the JSON
    python -m eval.bench.step --device cuda --compile          1B and 8B, compiled

A "layer" shape is one square linear: forward and backward of 2048 tokens. All others are Llamas with random
weights: forward, backward and AdamW step, every linear but the head adapted. "autocast" shapes have float32
adapters on a bfloat16 base; elsewhere adapters have the base's dtype, but for the case "as shipped".
The cases of a shape take turns in one run. Writes eval/results/step.json (step_cuda.json), one entry per shape.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.bench import common, peers
from eval.bench.peers import (
    BASE,
    CASES,
    LOOP,
    MOLORA,
    PEFT_SHIPPED,
    PEFT_SMALL,
    PEFT_WIDE,
    XLORA_TRAINED,
    Size,
)

BF16, FP32 = torch.bfloat16, torch.float32
SHIPPED_AUTOCAST = "PEFT LoRA r=8 as shipped, autocast"
OVER = (BASE, PEFT_SMALL, PEFT_WIDE)
COMPILED = (BASE, PEFT_SMALL, PEFT_WIDE, MOLORA)  # the others break the graph in every layer


@dataclass(frozen=True)
class Shape:
    """A base and what it is trained on."""

    size: Size
    dtype: torch.dtype
    samples: int = 2
    seq: int = 512
    autocast: bool = False  # and float32 adapters

    @property
    def is_layer(self) -> bool:
        return self.size.layers is None


def _layer(width: int, dtype: torch.dtype) -> Shape:
    return Shape(Size(None, width), dtype, samples=2, seq=1024)


def _large(size: Size, autocast: bool) -> Shape:
    return Shape(size, BF16, samples=4, seq=2048, autocast=autocast)


_55M, _110M = Size(4, 1024), Size(2, 2048)
_1B = Size(16, 2048, ff=8192, heads=32, kv_heads=8)
_8B = Size(32, 4096, ff=14336, heads=32, kv_heads=8)

CPU_SHAPES = {
    "layer 1024 fp32": _layer(1024, FP32),
    "layer 2048 fp32": _layer(2048, FP32),
    "layer 1024 bf16": _layer(1024, BF16),
    "layer 2048 bf16": _layer(2048, BF16),
    "27M fp32": Shape(Size(8, 512), FP32),
    "55M fp32": Shape(_55M, FP32),
    "55M bf16": Shape(_55M, BF16),
    "55M autocast": Shape(_55M, BF16, autocast=True),
    "110M bf16": Shape(_110M, BF16),
    "110M autocast": Shape(_110M, BF16, autocast=True),
}
CUDA_SHAPES = {
    "1B bf16": _large(_1B, autocast=False),
    "1B autocast": _large(_1B, autocast=True),
    "8B bf16": _large(_8B, autocast=False),
    "8B autocast": _large(_8B, autocast=True),
}
QUICK_SHAPES = {
    "layer quick": Shape(Size(None, 64), BF16, seq=16),
    "model quick": Shape(Size(2, 64, vocab=64), BF16, seq=16),
    "autocast quick": Shape(Size(2, 64, vocab=64), BF16, seq=16, autocast=True),
}


@dataclass(frozen=True)
class Bar:
    """`case` over `over` is at most `most`, or at least `least`, on these shapes."""

    shapes: tuple[str, ...]
    case: str
    over: str
    most: float | None = None
    least: float | None = None
    amx: bool = False  # holds on CPUs with AMX only

    def judge(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)

    def __str__(self) -> str:
        bound = f"<= {self.most}" if self.most is not None else f">= {self.least}"
        return f"{self.case} / {self.over} {bound}"


_WIDE_BF16 = ("55M bf16", "55M autocast", "110M bf16", "110M autocast")
_MODELS = ("27M fp32", "55M fp32", *_WIDE_BF16)
BARS = (
    Bar(("27M fp32",), MOLORA, PEFT_SMALL, most=1.07),
    Bar(("27M fp32",), MOLORA, PEFT_WIDE, most=1.03),
    Bar(_WIDE_BF16, MOLORA, PEFT_SMALL, most=1.03, amx=True),
    Bar(_WIDE_BF16, MOLORA, PEFT_WIDE, most=0.97, amx=True),
    Bar(_MODELS, XLORA_TRAINED, MOLORA, least=3.5),
    Bar(_MODELS, LOOP, MOLORA, least=1.7),
    Bar(("1B bf16", "8B bf16"), MOLORA, PEFT_SMALL, most=1.0),
    Bar(("1B bf16", "8B bf16"), MOLORA, PEFT_WIDE, most=0.97),
    Bar(("1B bf16", "8B bf16"), MOLORA, SHIPPED_AUTOCAST, most=0.88),
    Bar(("1B bf16",), MOLORA, BASE, most=1.22),
    Bar(("8B bf16",), MOLORA, BASE, most=1.15),
    Bar(tuple(CUDA_SHAPES), XLORA_TRAINED, MOLORA, least=2.5),
    Bar(tuple(CUDA_SHAPES), LOOP, MOLORA, least=2.5),
)


def cases_of(shape: Shape) -> list[str]:
    """The cases that apply to a shape."""
    names = [
        name for name in CASES if not (shape.is_layer and "X-LoRA" in name)
    ]  # X-LoRA needs a whole model
    if shape.autocast or shape.dtype == FP32:  # there PEFT's default is the same dtype
        names.remove(PEFT_SHIPPED)
    elif not shape.is_layer:
        names.append(SHIPPED_AUTOCAST)
    return names


def step_of(name: str, shape: Shape, base: nn.Module, *, compiled: bool = False) -> Callable[[], None]:
    """Build a case on shared weights; the result runs one step of it."""
    build = CASES[PEFT_SHIPPED] if name == SHIPPED_AUTOCAST else CASES[name]
    model = build(peers.share(base), FP32 if shape.autocast else None)
    torch.manual_seed(1)
    inputs = peers.batch(base, shape.samples, shape.seq)
    casts = shape.autocast or name == SHIPPED_AUTOCAST
    return training_step(torch.compile(model, dynamic=False) if compiled else model, inputs, autocast=casts)


def training_step(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], *, autocast: bool = False
) -> Callable[[], None]:
    """Forward, backward, and an AdamW step where there is a loss and something to train."""
    embeddings = next(iter(inputs.values()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    has_loss = "labels" in inputs
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters and has_loss else None
    upstream = torch.randn_like(embeddings)

    def step() -> None:
        with torch.autocast(embeddings.device.type, BF16, enabled=autocast):
            output = model(**inputs)
        if has_loss:
            output.loss.backward()
        else:
            output.backward(upstream)
        if optimizer is not None:
            optimizer.step()
        for tensor in (embeddings, *parameters):
            tensor.grad = None

    return step


def steps_of(
    names: Sequence[str], shape: Shape, *, device: str, compiled: bool
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """One step per case that fits into memory, and the names of those that do not."""
    torch.compiler.reset()  # else graphs of earlier shapes count towards the limit, past which all is eager
    base = peers.frozen_base(shape.size, shape.dtype, device)
    steps: dict[str, Callable[[], None]] = {}
    for name in names:
        try:
            step = step_of(name, shape, base, compiled=compiled)
            step()  # allocates the optimiser's state
            steps[name] = step
        except torch.OutOfMemoryError:
            step = None
        if step is None:  # outside the handler, whose exception holds the activations
            gc.collect()
            torch.cuda.empty_cache()
    return steps, [name for name in names if name not in steps]


def run_shape(name: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape, print its table and bars."""
    wanted = options.cases or (COMPILED if options.compile else cases_of(shape))
    names = [case for case in cases_of(shape) if case in wanted]
    if not names:
        raise SystemExit(f"none of {', '.join(wanted)} applies to {name}")
    steps, skipped = steps_of(names, shape, device=options.device, compiled=options.compile)
    times = common.interleaved(steps, rounds=options.rounds, device=options.device)
    rows = common.ratios(times, OVER)
    print(
        f"\n{name}{' compiled' * options.compile}, {shape.samples} x {shape.seq} tokens\n{common.table(rows)}"
    )
    for case in skipped:
        print(f"{case}: not enough memory")
    bars = {} if options.compile else judge(name, times, amx=common.environment()["amx"])
    for bar, (value, met) in bars.items():
        print(f"{'met' if met else 'MISSED'}: {bar}: {value}")
    return {
        "tokens": shape.samples * shape.seq,
        "rounds": options.rounds,
        "cases": rows,
        "bars": {bar: {"value": value, "met": met} for bar, (value, met) in bars.items()},
        "out of memory": skipped,
    }


def judge(
    shape: str, times: Mapping[str, Sequence[float]], *, amx: bool, bars: Sequence[Bar] = BARS
) -> dict[str, tuple[float, bool]]:
    """Value and verdict of every bar that holds for a shape and whose two cases were measured."""
    verdicts = {}
    for bar in bars:
        if shape in bar.shapes and {bar.case, bar.over} <= set(times) and (amx or not bar.amx):
            value = common.ratio(times, bar.case, bar.over)["median"]
            verdicts[str(bar)] = (value, bar.judge(value))
    return verdicts


def with_earlier(path: Path, shapes: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes measured now, and those an earlier run wrote in the same environment."""
    if not path.exists():
        return dict(shapes)
    earlier = json.loads(path.read_text())
    same = {**earlier["environment"], "date": None} == {**environment, "date": None}
    return {**earlier["shapes"], **shapes} if same else dict(shapes)


def main() -> None:
    """Run the shapes asked for, and write after each."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help="names of shapes; default: all of the device")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=[*CASES, SHIPPED_AUTOCAST],
        metavar="CASE",
        help="default: all that apply",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="compile the models; results go under '... compiled'"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    shapes = QUICK_SHAPES if options.quick else CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        options.rounds = 2
    if unknown := set(options.shapes or ()) - set(shapes):
        parser.error(f"unknown shapes {sorted(unknown)}; there are: {', '.join(shapes)}")
    name = "step" if options.device == "cpu" else "step_cuda"
    path = options.output or common.RESULTS / f"{name}.json"
    for shape in options.shapes or shapes:
        key = f"{shape} compiled" if options.compile else shape
        found = {key: run_shape(key, shapes[shape], options)}
        merged = with_earlier(path, found, common.environment(options.device))
        common.write(name, {"shapes": merged}, device=options.device, path=path)


if __name__ == "__main__":
    main()

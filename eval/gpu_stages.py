"""The stages that eval/gpu_check.py runs on a device: memory, matrix products, both trainers."""

from __future__ import annotations

import csv
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import molora
from eval.bench import common, peers
from eval.bench.peers import BASE, CASES, MOLORA, PEFT_SMALL, PEFT_WIDE, Size
from eval.bench.step import training_step
from eval.gpu_precision import TINY, batches, gate_dtypes, mixture
from molora.forward.dispatch import WAYS
from molora.hf import MoLoraTrainerMixin

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
MEMORY_CASES = (BASE, PEFT_SMALL, PEFT_WIDE, MOLORA)


def facts(device: str) -> dict[str, Any]:
    """The device as its driver describes it."""
    if device == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "L2 MiB": found.L2_cache_size >> 20,
        "memory GiB": round(total / 2**30, 1),
        "free GiB": round(free / 2**30, 1),
        "bf16": torch.cuda.is_bf16_supported(),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


def step_memory(
    name: str, size: Size, samples: int, seq: int, *, device: str, checkpointing: bool = False
) -> dict[str, float]:
    """GiB of one case on a bf16 base with bf16 adapters: at rest, and what a training step adds at its peak.

    At rest are the base, the adapters, AdamW's two moments and the batch. On a CPU, which counts nothing, the step
    still runs and the result is empty.
    """
    gc.collect()
    base = peers.frozen_base(size, torch.bfloat16, device)
    model = CASES[name](base, None)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = training_step(model, peers.batch(base, samples, seq))
    step()  # allocates the optimiser's state
    if device == "cpu":
        return {}
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated()
    return {key: round(n / 2**30, 4) for key, n in (("rest", rest), ("step", peak - rest), ("peak", peak))}


def memory_table(device: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    """`step_memory` of every case at a 1B shape and 8192 tokens, without and with gradient checkpointing."""
    size = TINY if quick else Size(16, 2048, ff=8192, heads=32, kv_heads=8)
    samples, seq = (2, 16) if quick else (4, 2048)
    found: dict[str, dict[str, Any]] = {}
    for checkpointing in (False, True):
        for name in MEMORY_CASES:
            row = f"{name}, checkpointing" if checkpointing else name
            try:
                found[row] = step_memory(name, size, samples, seq, device=device, checkpointing=checkpointing)
            except torch.OutOfMemoryError:
                found[row] = {"out of memory": True}
    return found


def judge_memory(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """The bars. A mixture has the parameters and moments of a LoRA as wide as all its experts, so what is at rest
    is compared with that one, and what the step adds with a LoRA of one expert's rank."""
    ours, small, wide = found[MOLORA], found[PEFT_SMALL], found[PEFT_WIDE]
    if not all("step" in row for row in (ours, small, wide)):
        return {}
    return {
        f"memory of a step <= 1.02 x {PEFT_SMALL}": ours["step"] <= 1.02 * small["step"],
        f"peak memory <= 1.02 x {PEFT_WIDE}": ours["peak"] <= 1.02 * wide["peak"],
    }


def skinny_gemms(device: str, *, quick: bool) -> dict[str, Any]:
    """GB/s of the products a mixture adds, over those of a copy: are they bound by memory alone?

    Every measurement goes round several buffers, together larger than a cache.
    """
    tokens, dtype, buffers = (64, torch.bfloat16, 2) if quick else (8192, torch.bfloat16, 8)

    def random(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device, dtype=dtype) for _ in range(buffers)]

    found: dict[str, Any] = {}
    for d in (64,) if quick else (2048, 4096):
        xs, ys = random(tokens, d), random(tokens, d)
        pairs = list(zip(xs, ys, strict=True))
        copy = 2 * xs[0].nbytes / _seconds([lambda x=x, y=y: y.copy_(x) for x, y in pairs], device)
        rows: dict[str, float] = {}
        for n in (8, 64, 72, 136, 192, 200):
            A, zs = torch.randn(n, d, device=device, dtype=dtype), random(tokens, n)
            moved = xs[0].nbytes + A.nbytes + zs[0].nbytes
            rows[f"x A, {n}"] = moved / _seconds([lambda x=x, A=A: F.linear(x, A) for x in xs], device)
            rows[f"dx, {n}"] = moved / _seconds([lambda z=z, A=A: z @ A for z in zs], device)
            both = list(zip(zs, xs, strict=True))
            rows[f"dA, {n}"] = moved / _seconds([lambda z=z, x=x: z.t() @ x for z, x in both], device)
        hs, B = random(tokens, 64), torch.randn(64, d, device=device, dtype=dtype)
        moved = 2 * ys[0].nbytes + hs[0].nbytes + B.nbytes
        both = list(zip(ys, hs, strict=True))
        adds = [lambda y=y, h=h, B=B: y.addmm_(h, B, alpha=1e-3) for y, h in both]
        rows["y += h B, 64"] = moved / _seconds(adds, device)
        ratios = {name: round(value / copy, 3) for name, value in rows.items()}
        found[f"d={d}"] = {"copy GB/s": round(copy / 1e9, 1), **ratios}
    return found


def ways_by_experts(device: str, *, quick: bool) -> dict[str, Any]:
    """One linear, forward and backward, under a top-2 token gate: each way over the frozen base."""
    width, seq, rounds = (64, 16, 2) if quick else (2048, 2048, 9)
    base = peers.frozen_base(Size(None, width), torch.bfloat16, device)
    inputs, found = peers.batch(base, 2, seq), {}
    for experts in (8, 16) if quick else (8, 16, 32, 64, 128):
        model = peers.molora(experts=experts)(peers.share(base), None)
        runs = {BASE: training_step(peers.share(base), inputs)}
        runs |= {way: _forced(way, training_step(model, inputs)) for way in WAYS}
        times = common.interleaved(runs, rounds=rounds, device=device)
        found[f"{experts} experts"] = {way: common.ratio(times, way, BASE) for way in WAYS}
    return found


def _forced(way: str, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with molora.dispatch(way):
            step()

    return run


def _seconds(calls: list[Callable[[], Any]], device: str, repeats: int = 10) -> float:
    """Seconds per call. On a GPU the calls are replayed as one graph: some take less time than their launch."""

    def run() -> None:
        for call in calls:
            call()

    if device == "cpu":
        run()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats / len(calls)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    before.record()
    for _ in range(repeats):
        graph.replay()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / repeats / len(calls)


def lightning_runs(device: str, scratch: Path, steps: int) -> dict[str, Any]:
    """The quickstart recipe, shortened, in mixed precision; Lightning has fp16 on a GPU only."""
    found = {}
    for precision in ("bf16-mixed", "16-mixed") if device == "cuda" else ("bf16-mixed",):
        settings = [
            f"train.max_steps={steps}", f"train.precision={precision}", f"output={scratch / precision}",
            f"train.accelerator={'gpu' if device == 'cuda' else 'cpu'}", "eval.modes=[gate]", "train.log_every=1",
        ]  # fmt: skip
        run = molora.train(str(RECIPE), settings)
        with (run.path / "metrics.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        weights = load_file(run.adapter / "adapter_model.safetensors").values()
        found[precision] = {
            "steps": len(losses),
            "first": round(losses[0], 4),
            "last": round(losses[-1], 4),
            "finite": all(map(math.isfinite, losses)) and all(bool(w.isfinite().all()) for w in weights),
            "float32": {w.dtype for w in weights} == {torch.float32},
        }
    return found


class _MixtureTrainer(MoLoraTrainerMixin, Trainer):
    """transformers' Trainer with the auxiliary losses added exactly once."""


def trainer_runs(device: str, scratch: Path, steps: int) -> dict[str, Any]:
    """transformers' Trainer in mixed precision (fp16 on a GPU only), from the stock class and with the mixin."""
    rows = [{"input_ids": ids, "labels": ids} for ids in next(batches("cpu", 1, (64, 16)))]
    found = {}
    for precision in ("bf16", "fp16") if device == "cuda" else ("bf16",):
        for trainer_class in (Trainer, _MixtureTrainer):
            model = mixture(peers.frozen_base(TINY, torch.float32, device))
            arguments = TrainingArguments(
                str(scratch / precision),
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=2e-3,
                logging_steps=1,
                logging_nan_inf_filter=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=device == "cpu",
                **{precision: True},  # type: ignore[arg-type]
            )
            trainer = trainer_class(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
            with gate_dtypes(model) as seen:
                trainer.train()
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            trained = [p for p in model.parameters() if p.requires_grad]
            scaler = trainer.accelerator.scaler
            found[f"{precision}, {trainer_class.__name__.strip('_')}"] = {
                "first": round(losses[0], 4),
                "last": round(losses[-1], 4),
                "finite": all(map(math.isfinite, losses)) and all(bool(p.isfinite().all()) for p in trained),
                "float32": seen | {p.dtype for p in trained} == {torch.float32},
                "scale": None if scaler is None else scaler.get_scale(),
            }
    return found

"""The stages of eval/gpu_check.py: what is trained and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import molora
from eval.bench import peers
from eval.bench.peers import BASE, CASES, MOLORA, PEFT_SMALL, PEFT_WIDE, Size
from eval.bench.step import training_step
from molora import GateConfig, MoLoraConfig
from molora.hf import MoLoraTrainerMixin
from molora.tuner.layer import MoLoraLayer

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
VOCAB = 256
TINY, SMALL = Size(2, 64, vocab=VOCAB), Size(8, 512, vocab=VOCAB)

# How far the mean loss of the last tenth may be from float32's, as a share of what float32 gained. Rounding a base to
# 16 bits moves the start a little; NF4 and int8 change the base itself.
BOUNDS = {
    "bf16-mixed": 0.05,
    "16-mixed": 0.05,
    "bf16 base, fp32 experts, autocast": 0.08,
    "bf16 base, fp32 experts": 0.08,
    "bf16 base, int8": 0.15,
    "bf16 base, NF4": 0.25,
}


def mixture(base: nn.Module) -> Any:
    """A top-2 mixture on all linears, with losses on its gates."""
    torch.manual_seed(1)
    config = MoLoraConfig(
        num_experts=4,
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        gate=GateConfig(top_k=2),
        aux_losses={"balance": 0.01, "z": 0.001},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config).train()


def batches(device: str, steps: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Walks through a fixed random permutation of the vocabulary: every next token can be known."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(VOCAB, generator=generator)
    for _ in range(steps):
        tokens = [torch.randint(VOCAB, size[:1], generator=generator)]
        for _ in range(size[1] - 1):
            tokens.append(follows[tokens[-1]])
        yield torch.stack(tokens, dim=1).to(device)


@contextmanager
def gate_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Dtypes of everything the gates answer inside."""
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, args: Any, routing: Any) -> None:
        seen.update({routing.weights.dtype, routing.logits.dtype})

    gates = [gate for m in model.modules() if isinstance(m, MoLoraLayer) for gate in m.molora_gate.values()]
    handles = [gate.register_forward_hook(look) for gate in gates]
    yield seen
    for handle in handles:
        handle.remove()


def train(
    model: Any, device: str, steps: int, *, autocast: torch.dtype | None, size: tuple[int, int]
) -> dict[str, Any]:
    """Train and tell losses, skipped steps, and whether gates, their losses and all parameters stayed float32."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    scaler = torch.amp.GradScaler(device, enabled=autocast == torch.float16)
    losses, skipped, start = [], 0, time.perf_counter()
    with gate_dtypes(model) as seen:
        for ids in batches(device, steps, size):
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=ids).loss
            seen.update(value.dtype for value in molora.aux_losses(model).values())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            optimizer.zero_grad()
            losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return {
        "first": round(losses[0], 4),
        "last": round(sum(tail) / len(tail), 4),
        "finite": all(map(math.isfinite, losses)) and all(bool(p.isfinite().all()) for p in parameters),
        "float32": seen | {p.dtype for p in parameters} == {torch.float32},
        "skipped": skipped,
        "scale": scaler.get_scale(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def precision_runs(device: str, steps: int, *, quick: bool) -> dict[str, Any]:
    """The same training in every precision; quantised bases where bitsandbytes can be imported."""
    model_size, size = (TINY, (4, 16)) if quick else (SMALL, (16, 128))

    def run(dtype: torch.dtype, autocast: torch.dtype | None) -> dict[str, Any]:
        model = mixture(peers.frozen_base(model_size, dtype, device))
        return train(model, device, steps, autocast=autocast, size=size)

    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    found = {
        "float32": run(full, None),
        "bf16-mixed": run(full, brain),
        "16-mixed": run(full, half),
        "bf16 base, fp32 experts, autocast": run(brain, brain),
        "bf16 base, fp32 experts": run(brain, None),
    }
    for name, options in {
        "bf16 base, int8": {"load_in_8bit": True},
        "bf16 base, NF4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": brain,
        },
    }.items():
        try:
            base = _quantised(model_size, device, options)
        except ImportError as error:
            found[name] = {"skipped": str(error)}
            continue
        found[name] = train(mixture(base), device, steps, autocast=brain, size=size)
    return found


def _quantised(size: Size, device: str, options: dict[str, Any]) -> nn.Module:
    """The same base, through a folder: transformers quantises while it loads."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        peers.frozen_base(size, torch.float32).save_pretrained(folder)
        base = LlamaForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**options),
            dtype=torch.bfloat16,
            device_map={"": device},
        )
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def judge_precision(found: dict[str, Any], steps: int) -> dict[str, bool]:
    """Finite, float32 where it must be, hardly a skipped step, and the loss near float32's."""
    exact = found["float32"]
    gained = exact["first"] - exact["last"]
    checks = {"float32 learns": gained > 0}
    for name, row in found.items():
        if "skipped" in row and isinstance(row["skipped"], str):
            continue
        checks[f"{name}: finite, gate and losses float32"] = row["finite"] and row["float32"]
        # The scale starts at 65536 and is halved once per skipped step: more than a tenth means it never settles.
        checks[f"{name}: at most a tenth of the steps skipped"] = row["skipped"] <= max(3, steps // 10)
        if name in BOUNDS:
            near = abs(row["last"] - exact["last"]) <= BOUNDS[name] * gained
            checks[f"{name}: loss within {BOUNDS[name]:.0%} of float32's gain"] = near
    return checks


def peak_memory(quick: bool) -> dict[str, Any]:
    """Bytes at the peak of a training step at 8192 tokens, with and without gradient checkpointing."""
    size = TINY if quick else Size(16, 2048, ff=8192, heads=32, kv_heads=8)
    samples, seq = (2, 16) if quick else (4, 2048)
    base = peers.frozen_base(size, torch.bfloat16, "cuda")
    found: dict[str, Any] = {"plain": {}, "checkpointing": {}}
    for name in (BASE, PEFT_SMALL, PEFT_WIDE, MOLORA):
        for how, row in found.items():
            model = CASES[name](peers.share(base), None)
            if how == "checkpointing":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            step = training_step(model, peers.batch(base, samples, seq))
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            row[name] = torch.cuda.max_memory_allocated()
    return found


def skinny_gemms(device: str, *, quick: bool) -> dict[str, Any]:
    """Achieved GB/s of the products a mixture adds, over that of a copy: are they bound by memory alone?"""
    tokens, dtype = (64 if quick else 8192), torch.bfloat16
    found: dict[str, Any] = {}
    for d in (64,) if quick else (2048, 4096):
        x = torch.randn(tokens, d, device=device, dtype=dtype)
        y = torch.empty_like(x)
        copy = 2 * x.nbytes / _seconds(lambda x=x, y=y: y.copy_(x), device)
        rows: dict[str, float] = {}
        for n in (8, 64, 72, 136, 192, 200):
            A = torch.randn(n, d, device=device, dtype=dtype)
            z = torch.randn(tokens, n, device=device, dtype=dtype)
            moved = x.nbytes + A.nbytes + z.nbytes
            rows[f"x A, {n}"] = moved / _seconds(lambda x=x, A=A: F.linear(x, A), device)
            rows[f"dx, {n}"] = moved / _seconds(lambda z=z, A=A: z @ A, device)
            rows[f"dA, {n}"] = moved / _seconds(lambda z=z, x=x: z.t() @ x, device)
        h, B = (
            torch.randn(tokens, 64, device=device, dtype=dtype),
            torch.randn(64, d, device=device, dtype=dtype),
        )
        moved = 2 * y.nbytes + h.nbytes + B.nbytes
        rows["y += h B, 64"] = moved / _seconds(lambda y=y, h=h, B=B: y.addmm_(h, B, alpha=1e-3), device)
        found[f"d={d}"] = {
            "copy GB/s": round(copy / 1e9, 1),
            **{name: round(value / copy, 3) for name, value in rows.items()},
        }
    return found


def _seconds(run: Callable[[], Any], device: str, repeats: int = 20) -> float:
    for _ in range(3):
        run()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


def lightning_runs(device: str, scratch: Path, steps: int) -> dict[str, Any]:
    """The quickstart recipe, shortened, in mixed precision; fp16 needs a GPU there."""
    found = {}
    for precision in ("bf16-mixed", "16-mixed") if device == "cuda" else ("bf16-mixed",):
        settings = [
            f"train.max_steps={steps}", f"train.precision={precision}", f"output={scratch / precision}",
            f"train.accelerator={'gpu' if device == 'cuda' else 'cpu'}", "eval.modes=[gate]", "train.log_every=1",
        ]  # fmt: skip
        run = molora.train(str(RECIPE), settings)
        from safetensors.torch import load_file

        weights = load_file(run.adapter / "adapter_model.safetensors")
        found[precision] = {
            "finite": all(bool(value.isfinite().all()) for value in weights.values()),
            "float32": {value.dtype for value in weights.values()} == {torch.float32},
        }
    return found


class _MixtureTrainer(MoLoraTrainerMixin, Trainer):
    """transformers' Trainer with the auxiliary losses added exactly once."""


def trainer_runs(device: str, scratch: Path, steps: int) -> dict[str, Any]:
    """transformers' Trainer in mixed precision, from the stock class and with the mixin."""
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
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=device == "cpu",
                **{precision: True},  # type: ignore[arg-type]
            )
            with gate_dtypes(model) as seen:
                result = trainer_class(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
            trained = [p for p in model.parameters() if p.requires_grad]
            found[f"{precision}, {trainer_class.__name__.strip('_')}"] = {
                "loss": round(result.training_loss, 4),
                "finite": math.isfinite(result.training_loss)
                and all(bool(p.isfinite().all()) for p in trained),
                "float32": seen | {p.dtype for p in trained} == {torch.float32},
            }
    return found

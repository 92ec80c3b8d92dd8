"""Short trainings of one small model in every precision, and the checks on them."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import molora
from eval.bench import peers
from eval.bench.peers import Size
from molora import GateConfig, MoLoraConfig
from molora.tuner.layer import MoLoraLayer

VOCAB = 256
TINY, SMALL = Size(2, 64, vocab=VOCAB), Size(8, 512, vocab=VOCAB)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Precision:
    """Dtypes of a training. Experts and gates are float32 in all of them."""

    base: torch.dtype = FP32
    autocast: torch.dtype | None = None
    quantisation: Mapping[str, Any] = field(default_factory=dict)  # for BitsAndBytesConfig
    # How far the mean loss of the last tenth may be from float32's, as a share of what float32 gained: the loss
    # itself goes to zero here, and a share of it would then mean nothing.
    bound: float = 0.0


REFERENCE = "float32"
PRECISIONS = {
    REFERENCE: Precision(),
    # On a CPU, at two sizes, these four ended within 0.7 %; the rest is for other orders of summation.
    "bf16-mixed": Precision(autocast=BF16, bound=0.02),
    "16-mixed": Precision(autocast=FP16, bound=0.02),
    "bf16 base, autocast": Precision(BF16, BF16, bound=0.02),
    "bf16 base": Precision(BF16, bound=0.02),
    # 8 and 4 bits change the base's own function: by about 1 % and 10 % of a weight.
    "int8 base": Precision(BF16, BF16, {"load_in_8bit": True}, bound=0.05),
    "NF4 base": Precision(
        BF16,
        BF16,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": BF16},
        bound=0.10,
    ),
}
# Of GradScaler's first scale, 65536, halved by every skipped step: on a CPU none is skipped.
MOST_SKIPPED = 3
LEAST_SCALE = 65536 / 2**MOST_SKIPPED


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
    """Walks through a fixed random permutation of the vocabulary: every next token is predictable.

    Without token 0: it pads, its embedding is zero, and the norm of a zero vector multiplies the gradient by 50 in
    every layer, which no loss scale survives, whatever is trained.
    """
    generator = torch.Generator().manual_seed(0)
    follows = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(VOCAB - 1, generator=generator)]
    )
    for _ in range(steps):
        tokens = [torch.randint(1, VOCAB, size[:1], generator=generator)]
        for _ in range(size[1] - 1):
            tokens.append(follows[tokens[-1]])
        yield torch.stack(tokens, dim=1).to(device)


@contextmanager
def gate_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Dtypes of all outputs of the gates within the block."""
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, args: Any, routing: Any) -> None:
        seen.update({routing.weights.dtype, routing.logits.dtype})

    gates = [gate for m in model.modules() if isinstance(m, MoLoraLayer) for gate in m.molora_gate.values()]
    handles = [gate.register_forward_hook(look) for gate in gates]
    yield seen
    for handle in handles:
        handle.remove()
    # Without any output there would be nothing to check.
    assert seen, "no gate was asked"


def precision_runs(device: str, steps: int, *, quick: bool) -> dict[str, Any]:
    """The same training in every precision. One that fails, or whose package is missing, becomes a row that says so."""
    found: dict[str, Any] = {}
    for name in PRECISIONS:
        try:
            found[name] = precision_run(name, device, steps, quick=quick)
        except ImportError as error:
            found[name] = {"skipped": str(error)}
        except Exception as error:  # noqa: BLE001 - the other precisions are still informative
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        gc.collect()
    return found


def precision_run(name: str, device: str, steps: int, *, quick: bool) -> dict[str, Any]:
    """Train in one of `PRECISIONS`. Raises ImportError where its base needs a package that is not there."""
    precision, size = PRECISIONS[name], TINY if quick else SMALL
    if precision.quantisation:
        base = _quantised(size, device, precision.quantisation)
    else:
        base = peers.frozen_base(size, precision.base, device)
    return train(
        mixture(base),
        device,
        steps,
        autocast=precision.autocast,
        size=(4, 16) if quick else (16, 128),
    )


def train(
    model: Any, device: str, steps: int, *, autocast: torch.dtype | None, size: tuple[int, int]
) -> dict[str, Any]:
    """Train and tell losses, skipped steps, and whether gates, their losses and all parameters stayed float32."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    scaler = torch.amp.GradScaler(device, enabled=autocast == FP16)
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
        seconds = time.perf_counter() - start
        routed = _routed(model, ids, autocast)
    tail = losses[-max(1, steps // 10) :]
    return {
        "first": round(losses[0], 4),
        "last": round(sum(tail) / len(tail), 4),
        "finite": all(map(math.isfinite, losses)) and all(bool(p.isfinite().all()) for p in parameters),
        "float32": seen | {p.dtype for p in parameters} == {FP32},
        "routed": routed,
        "skipped steps": skipped,
        "scale": scaler.get_scale(),
        "seconds": round(seconds, 1),
    }


def _routed(model: Any, ids: Tensor, autocast: torch.dtype | None) -> bool:
    """Whether each gate's recorded weights, over all experts, are shares that add up to one."""
    with (
        torch.no_grad(),
        torch.autocast(ids.device.type, autocast, enabled=autocast is not None),
        molora.record_routing(model) as record,
    ):
        model(input_ids=ids)
    gates: dict[str, float] = {}
    for row in record.table():
        gates[row["gate"]] = gates.get(row["gate"], 0.0) + row["mean_weight"]
    return bool(gates) and all(abs(total - 1) < 1e-4 for total in gates.values())


def _quantised(size: Size, device: str, options: Mapping[str, Any]) -> nn.Module:
    """The same base, through a folder: transformers quantises while it loads."""
    with tempfile.TemporaryDirectory() as folder:
        # On the device: its generator draws different weights than the CPU's, and the float32 run drew them there.
        peers.frozen_base(size, FP32, device).save_pretrained(folder)
        base = LlamaForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**options),
            dtype=BF16,
            device_map={"": device},
        )
    base.config.use_cache = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def judge_precision(found: Mapping[str, Any]) -> dict[str, bool]:
    """Finite, float32 where it must be, hardly a skipped step, and the loss near float32's."""
    checks: dict[str, bool] = {}
    for name, row in found.items():
        if "skipped" in row:
            continue
        checks[f"{name}: runs"] = "error" not in row
        if "error" not in row:
            checks |= {f"{name}: {check}": ok for check, ok in judge_run(row).items()}
            if name != REFERENCE and "error" not in found[REFERENCE]:
                bound = PRECISIONS[name].bound
                checks[f"{name}: loss within {bound:.0%} of float32's gain"] = is_near(
                    row, found[REFERENCE], bound
                )
    return checks


def judge_run(row: Mapping[str, Any]) -> dict[str, bool]:
    """The checks that hold in every precision."""
    return {
        "learns": row["last"] < row["first"],
        "all finite": row["finite"],
        "gates, their losses and all that is trained are float32": row["float32"],
        "recorded weights add up to one": row["routed"],
        f"at most {MOST_SKIPPED} steps skipped": row["skipped steps"] <= MOST_SKIPPED,
    }


def is_near(row: Mapping[str, Any], reference: Mapping[str, Any], bound: float) -> bool:
    """Whether a training ends within `bound` of what the reference gained."""
    return abs(row["last"] - reference["last"]) <= bound * (reference["first"] - reference["last"])

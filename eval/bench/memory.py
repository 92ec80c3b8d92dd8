"""Counts the bytes that autograd keeps of a forward pass, exactly: with fake tensors, nothing is computed.

    python -m eval.bench.memory

For a Llama layer of 1B and of 8B widths on a bfloat16 base, 8192 tokens, every linear adapted: bytes per token
and layer in units of d * 2 bytes, and over PEFT LoRA r=8 with the same adapters: bfloat16; float32 under
autocast; float32 without. Parameters and buffers do not count, tensors that share a storage count once. The
figures are those of attention on a CPU (which keeps no matrix of scores). Writes eval/results/memory.json.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eval.bench import common, peers
from eval.bench.peers import BASE, MOLORA, PEFT_SMALL, PEFT_WIDE, Builder, Size

WIDTHS = {
    "1B": Size(1, 2048, ff=8192, heads=32, kv_heads=8),
    "8B": Size(1, 4096, ff=14336, heads=32, kv_heads=8),
}
QUICK_WIDTHS = {"quick": Size(1, 64, ff=128, heads=4, kv_heads=2)}
# dtype of the adapters, and whether the forward runs under autocast
ADAPTERS = {
    "bf16": (torch.bfloat16, False),
    "fp32 + autocast": (torch.float32, True),
    "fp32": (torch.float32, False),
}
# transformers' usual attention, but for its look at the positions: it cannot see in fake ones that they make one
# plain sequence, and would write out a causal mask that a real run does without.
ATTENTION = "sdpa_unmasked"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)

CASES = (BASE, PEFT_SMALL, PEFT_WIDE, MOLORA)
TOKENS = 8192


def saved_bytes(model: nn.Module, tokens: int, *, autocast: bool = False) -> int:
    """Bytes of distinct storages, parameters and buffers aside, that one training forward leaves for backward.

    Args:
        model: what a builder of `peers` returned, real or fake (see `fake`).
        tokens: length of the one sequence it is given.
        autocast: run the forward under autocast to bfloat16.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors too: a freed storage's address may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with _mode_of(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = peers.batch(model, 1, tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**inputs)
    del output  # until here it kept the graph
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bytes_per_layer(build: Builder, size: Size, tokens: int, adapters: str) -> int:
    """Saved bytes of one layer: what a second layer adds, so that embedding, head and loss cancel."""
    dtype, autocast = ADAPTERS[adapters]
    one, two = (
        saved_bytes(fake(build, replace(size, layers=layers), dtype), tokens, autocast=autocast)
        for layers in (1, 2)
    )
    return two - one


def fake(build: Builder, size: Size, adapter_dtype: torch.dtype) -> nn.Module:
    """A model on a bfloat16 base whose weights are fake: they have shapes, but no values and no memory."""
    with torch.device(
        "meta"
    ):  # methods move adapters about, which fake weights refuse and meta weights allow
        base = peers.frozen_base(size, torch.bfloat16, "meta")
        base.set_attn_implementation(ATTENTION)
        model = build(base, adapter_dtype)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def measure(widths: dict[str, Size], tokens: int) -> dict[str, Any]:
    """Every case at every width, with every kind of adapter."""
    found: dict[str, Any] = {}
    for width, size in widths.items():
        for adapters in ADAPTERS:
            kept = {name: bytes_per_layer(peers.CASES[name], size, tokens, adapters) for name in CASES}
            rows = {
                name: {
                    "bytes per token and layer": count // tokens,
                    "units": round(count / tokens / (size.width * 2), 3),
                    f"over {PEFT_SMALL}": round(count / kept[PEFT_SMALL], 4),
                }
                for name, count in kept.items()
            }
            found[f"{width}, {adapters}"] = rows
            print(f"\n{width} widths, {adapters} adapters, {tokens} tokens\n{common.table(rows)}")
    return found


def _mode_of(model: nn.Module) -> AbstractContextManager[Any]:
    return detect_fake_mode(list(model.parameters())) or nullcontext()


def main() -> None:
    """Count, print and write."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny width and few tokens")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    tokens = 64 if options.quick else TOKENS
    found = measure(QUICK_WIDTHS if options.quick else WIDTHS, tokens)
    common.write("memory", {"tokens": tokens, "widths": found}, path=options.output)


if __name__ == "__main__":
    main()

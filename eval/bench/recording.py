"""Times what it costs to record what gates decide, in evaluation and in training.

    python -m eval.bench.recording

A Llama with random weights, 8 experts of rank 8 on every linear, top-2 by token, a gate for each group of linears; 8 samples of
64 tokens, and of 256. "evaluation": a forward under `record_routing` over one without. "training": a step (forward, backward,
AdamW) that is recorded over one that is not; the metrics of training record one step in EVERY times `log_every`, 50 by default,
and "counted" spreads it over these. The cases take turns in one run. Writes eval/results/recording.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from eval.bench import common, peers
from eval.bench.peers import Size
from molora import GateConfig, MoLoraConfig, record_routing
from molora.training.live_routing import EVERY

LOG_EVERY = 10
SHAPES = {
    "fp32 8 x 512, 8 x 64 tokens": (Size(8, 512), 64),
    "fp32 4 x 1024, 8 x 256 tokens": (Size(4, 1024), 256),
}
QUICK = {"quick": (Size(2, 64, vocab=64), 16)}
BARS = {"evaluation": 1.05, "training": 1.02}


def adapter(base: nn.Module) -> nn.Module:
    """Eight experts behind top-2 gates."""
    mine = peers.share(base)
    config = MoLoraConfig(
        num_experts=8, r=peers.RANK, lora_alpha=peers.ALPHA, target_modules=peers.targets(mine), task_type="CAUSAL_LM",
        gate=GateConfig(select="top_k", top_k=2, share="group"),
    )  # fmt: skip
    return peers.ready(get_peft_model(mine, config, autocast_adapter_dtype=False), None)


def runs_of(mode: str, model: nn.Module, seq: int, vocab: int) -> dict[str, Callable[[], None]]:
    """What is timed, with and without recording."""
    torch.manual_seed(1)
    ids = torch.randint(vocab, (8, seq))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def once(recorded: bool) -> None:
        with record_routing(model) if recorded else nullcontext() as record:
            if mode == "evaluation":
                with torch.no_grad():
                    model.eval()(input_ids=ids)
            else:
                model.train()(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        if record is not None:
            record.table()

    return {"plain": lambda: once(False), "recorded": lambda: once(True)}


def measure(name: str, size: Size, seq: int, rounds: int) -> dict[str, Any]:
    """Both modes of one shape; prints their tables and bars."""
    base = peers.frozen_base(size, torch.float32)
    model, found = adapter(base), {}
    for mode, bar in BARS.items():
        times = common.interleaved(runs_of(mode, model, seq, base.config.vocab_size), rounds=rounds)
        ratio = common.ratio(times, "recorded", "plain")
        value = (
            ratio["median"]
            if mode == "evaluation"
            else round(1 + (ratio["median"] - 1) / (EVERY * LOG_EVERY), 5)
        )
        met = value <= bar
        print(
            f"{'met' if met else 'MISSED'}: {name}, {mode}: recorded / plain {ratio['median']}, counted {value} <= {bar}"
        )
        found[mode] = {"recorded / plain": ratio, "counted": value, "bar": bar, "met": met}
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
    found = {name: measure(name, size, seq, rounds) for name, (size, seq) in shapes.items()}
    common.write(
        "recording", {"shapes": found}, device="cpu", path=options.output or common.RESULTS / "recording.json"
    )


if __name__ == "__main__":
    main()

"""Draws how the cost of a training step grows when one thing grows, beside the growth of its FLOPs.

    python -m eval.bench.scaling
    python -m eval.bench.scaling --panels width tasks

Step (forward, backward, AdamW) of a Llama with random weights over that of the frozen base, for 2 to 512 experts,
ranks 4 to 64, sequences, widths, and the number of tasks in a batch under a task gate. The FLOP bound counts every
product with a weight and those of attention: six per element of A and B and token, of all experts (under a task gate, of
one). A mixture of E experts of rank r, all of them computed, has the products of one LoRA of rank E r, which is drawn
too, to rank 1024. The cases of a panel's point take turns in one run. Writes eval/results/scaling.json and scaling.png; panels
that are not asked for stay as they were measured, under their own date.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from eval.bench import common, peers
from eval.bench.peers import Size
from eval.bench.step import training_step
from molora import GateConfig, MoLoraConfig

MINE, WIDE, BASE = "molora", "PEFT LoRA r=E*r", "frozen base"
WIDEST = 1024  # rank of the wide LoRA, above which it is left out
GROWTH = 1.35  # at most, of step(E=64) / step(E=8)


@dataclass(frozen=True)
class Point:
    """One setting of everything that can grow."""

    size: Size
    experts: int = 8
    rank: int = 8
    samples: int = 2
    seq: int = 512
    tasks: int | None = None  # under a task gate, tasks in the batch; None: a top-2 gate over tokens


@dataclass(frozen=True)
class Panel:
    """A curve: the values of one thing, all else as in `start`."""

    title: str
    axis: str
    values: tuple[int, ...]
    start: Point

    def at(self, value: int) -> Point:
        """The point of a value."""
        if self.axis == "width":
            return replace(self.start, size=replace(self.start.size, width=value))
        return replace(self.start, **{self.axis: value})


_MODEL = Point(Size(2, 1024))
PANELS = (
    Panel("experts (r=8)", "experts", (2, 4, 8, 16, 32, 64, 128, 256, 512), _MODEL),
    Panel("rank (8 experts)", "rank", (4, 8, 16, 32, 64), _MODEL),
    Panel("sequence length (batch 2)", "seq", (128, 256, 512, 1024, 2048), _MODEL),
    Panel("width", "width", (256, 512, 1024, 2048), _MODEL),
    Panel("tasks in the batch (task gate)", "tasks", (1, 2, 4, 8), replace(_MODEL, samples=8, seq=128)),
)
_QUICK = Point(Size(1, 64, vocab=64), samples=8, seq=8)
QUICK_PANELS = (
    Panel("experts", "experts", (8, 64), _QUICK),
    Panel("tasks in the batch", "tasks", (1, 2), _QUICK),
)


def linear_flops(size: Size, tokens: int) -> tuple[int, int]:
    """Products per step with the frozen linears (forward and to the input), and per rank of an adapter on them."""
    d, ff = size.width, size.ff or size.width * 8 // 3 // 64 * 64
    kv = d * (size.kv_heads or size.heads) // size.heads
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    layers = size.layers or 0
    frozen = layers * sum(4 * n * m for n, m in shapes) + 4 * d * size.vocab
    return tokens * frozen, tokens * layers * sum(6 * (n + m) for n, m in shapes)


def flop_bound(point: Point, rank: int) -> float:
    """FLOPs of a step with adapters of this total rank over those of the frozen base."""
    tokens = point.samples * point.seq
    frozen, per_rank = linear_flops(point.size, tokens)
    # Two products forward, four (five as flash attention runs it) backward, causal: half of each.
    attention = (point.size.layers or 0) * (2 + 5) * tokens * point.seq * point.size.width
    return 1 + rank * per_rank / (frozen + attention)


def model_of(point: Point, base: nn.Module) -> nn.Module:
    """The mixture of a point."""
    mine = peers.share(base)
    names = [f"expert_{i}" for i in range(point.experts)]
    config = MoLoraConfig(
        num_experts=point.experts,
        r=point.rank,
        lora_alpha=2 * point.rank,
        target_modules=peers.targets(mine),
        gate=GateConfig(top_k=2) if point.tasks is None else GateConfig(scope="task"),
        tasks={name.replace("expert", "task"): [name] for name in names},
        task_type="CAUSAL_LM",
    )
    return peers.ready(get_peft_model(mine, config, autocast_adapter_dtype=False), None)


def measure(point: Point, rounds: int) -> dict[str, Any]:
    """Ratios of the mixture and of the wide LoRA over the base, and their FLOP bound."""
    base = peers.frozen_base(point.size, torch.float32)
    inputs = peers.batch(base, point.samples, point.seq)
    rank = point.experts * point.rank
    ids = {}
    if point.tasks is not None:
        ids = {"routing_task_ids": torch.arange(point.samples) % point.tasks}
    steps = {
        BASE: training_step(peers.share(base), inputs),
        MINE: training_step(model_of(point, base), {**inputs, **ids}),
    }
    if rank <= WIDEST:
        steps[WIDE] = training_step(peers.peft_lora(rank)(peers.share(base), None), inputs)
    rows = common.ratios(common.interleaved(steps, rounds=rounds), (BASE,))
    used = rank if point.tasks is None else point.rank
    return {
        "ms": {name: row["ms"] for name, row in rows.items()},
        **{name: rows[name][f"over {BASE}"] for name in (MINE, WIDE) if name in rows},
        "FLOP bound": round(flop_bound(point, used), 4),
    }


def growth(curve: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Step with 64 experts over step with 8, beside the same quotient of the FLOPs."""
    few, many = curve[8], curve[64]
    value = many[MINE]["median"] / few[MINE]["median"]  # each over the base of its own run: drift cancels
    bound = many["FLOP bound"] / few["FLOP bound"]
    return {
        "step(E=64) / step(E=8)": round(value, 4),
        "FLOP bound": round(bound, 4),
        "met": value <= GROWTH,
    }


def draw(curves: dict[str, dict[int, dict[str, Any]]], path: Path, machine: str) -> None:
    """One panel per curve: measured ratios with quartiles, and the bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    axes = grid.flatten()
    for axis, (title, curve) in zip(axes, curves.items(), strict=False):
        values = list(curve)
        for name, colour in ((MINE, "tab:blue"), (WIDE, "tab:orange")):
            at = [v for v in values if name in curve[v]]
            middle = [curve[v][name]["median"] for v in at]
            axis.plot(at, middle, "o-", color=colour, label=name, markersize=4)
            axis.fill_between(
                at,
                [curve[v][name]["q1"] for v in at],
                [curve[v][name]["q3"] for v in at],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        axis.plot(values, [curve[v]["FLOP bound"] for v in values], "k--", label="FLOP bound", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    axes[len(curves)].legend(*axes[0].get_legend_handles_labels(), loc="center left", frameon=False)
    figure.suptitle(f"training step over the frozen base, float32, one thread, {machine}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def earlier(
    path: Path, panels: Sequence[Panel]
) -> tuple[dict[str, dict[int, dict[str, Any]]], dict[str, str]]:
    """Curves of an earlier run and when they were measured, by title."""
    if not path.exists():
        return {}, {}
    found = json.loads(path.read_text(encoding="utf-8"))
    titles = {panel.title for panel in panels} & set(found["curves"])
    curves = {title: {int(value): row for value, row in found["curves"][title].items()} for title in titles}
    return curves, {title: found["dates"][title] for title in titles}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every panel, and write and draw after each."""
    common.quiet_process()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--panels", nargs="+", help="what grows, by axis; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny panels, two rounds")
    parser.add_argument("--output", type=Path, help="JSON to write; the picture goes beside it")
    options = parser.parse_args(arguments)
    panels, rounds = (QUICK_PANELS, 2) if options.quick else (PANELS, options.rounds)
    path = options.output or common.RESULTS / "scaling.json"
    axes = [panel.axis for panel in panels]
    if unknown := set(options.panels or ()) - set(axes):
        parser.error(f"unknown panels {sorted(unknown)}; there are: {', '.join(axes)}")
    curves, dates = earlier(path, panels) if options.panels else ({}, {})
    for panel in panels:
        if options.panels and panel.axis not in options.panels:
            continue
        curves[panel.title] = {value: measure(panel.at(value), rounds) for value in panel.values}
        dates[panel.title] = common.environment()["date"]
        rows = {
            f"{panel.axis} {v}": {k: x for k, x in row.items() if k != "ms"}
            for v, row in curves[panel.title].items()
        }
        print(f"\n{panel.title}\n{common.table(rows)}", flush=True)
        in_order = [one.title for one in panels if one.title in curves]
        curves, dates = ({title: one[title] for title in in_order} for one in (curves, dates))
        result = {"curves": curves, "dates": dates}
        if panels[0].title in curves:
            result["growth"] = growth(curves[panels[0].title])
        common.write("scaling", result, path=path)
        draw(curves, path.with_suffix(".png"), common.environment()["machine"])
    print(f"\n{result.get('growth', '')}")


if __name__ == "__main__":
    main()

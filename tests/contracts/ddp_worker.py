"""Run by test_ddp beside itself, two gloo processes: trains a mixture whose last expert is idle, writes what each rank got."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import molora
from tests.zoo import batch_for, molora_model

CASES = {
    # name: gate, config, task ids of rank 0 and rank 1. Nobody asks for gamma, so its expert is idle.
    "task": ("task-group", {}, (["alpha"] * 3, ["beta", "alpha", None])),
    "top-1": ("top1-linear", {"aux_losses": {"balance": 0.1}}, (None, None)),
    "grown": ("top2-group", {"frozen_experts": ["expert_0"]}, (None, None)),
    "checkpointed": ("top2-group", {"aux_losses": {"balance": 0.1}}, (None, None)),
}
STEPS = 2


def build(case: str) -> torch.nn.Module:
    """The model every rank starts from."""
    gate, config, _ = CASES[case]
    model = molora_model("llama", gate, **config).train()
    if case == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model: torch.nn.Module, case: str, rank: int, step: int) -> torch.Tensor:
    """One rank's loss in one step."""
    ids = CASES[case][2][rank]
    batch = batch_for("llama", seed=10 * step + rank)
    return model(**batch, **({} if ids is None else {"routing_task_ids": ids})).loss


def train(case: str, rank: int) -> dict[str, torch.Tensor]:
    """Trainable parameters after a few steps under DDP."""
    model = build(case)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, case, rank, step).backward()
        optimizer.step()
    assert all(value.isfinite() for value in molora.aux_losses(wrapped).values())
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def work(rank: int, folder: Path, timeout: float = 300) -> None:
    """Train every case as this rank of two, and write what it got; the other has `timeout` seconds for each answer."""
    where = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(seconds=timeout)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **where)
    try:
        torch.save({case: train(case, rank) for case in CASES}, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

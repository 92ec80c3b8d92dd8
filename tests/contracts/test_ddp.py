"""I12: two DDP processes with an idle expert agree with each other and with one process on the mean loss."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.ddp_worker import CASES, STEPS, build, loss_of, work

TIMEOUT = 300  # seconds


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.contracts.ddp_worker", "1", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        work(0, folder, TIMEOUT)  # this process is the other one
    finally:
        error = worker.communicate(timeout=TIMEOUT)[1]
    assert worker.returncode == 0, error
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_bit_for_bit_and_with_one_process(ranks, case):
    first, second = ranks[0][case], ranks[1][case]
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = build(case)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, case, rank, step) for rank in range(2)) / 2).backward()
        optimizer.step()
    expected = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert_close(first, expected, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(first[name], start[name]) for name in first)
    if case == "task":
        assert all(
            torch.equal(p[2], start[name][2]) for name, p in first.items()
        )  # nobody routed to expert 2

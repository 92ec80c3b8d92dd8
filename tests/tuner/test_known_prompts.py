"""Which prompts count as known: those as near to their task as its held-out prompts were, whatever was learned later."""

from __future__ import annotations

import pytest
import torch

from molora import RouterConfig
from molora.forward.task_router import TaskRouter

D, TASKS = 16, 8


def router(**settings):
    return TaskRouter(RouterConfig(unknown="base", **settings), range(TASKS), D)


def drawn(task, count, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + task)
    centre = torch.zeros(D, dtype=torch.float64)
    centre[task] = 20
    return centre + spread * torch.randn(count, D, generator=generator, dtype=torch.float64)


def refused(router, features):
    return float((~router.guess(features).known).double().mean())


@pytest.mark.parametrize("shrinkage", [0.1, "auto"])
def test_prompts_that_are_all_alike_stay_known_when_wider_tasks_arrive(shrinkage):
    """As where every prompt begins with the same long instruction and is cut behind it."""
    known, alike = router(shrinkage=shrinkage), drawn(0, 1).expand(50, D)
    known.learn({0: [drawn(0, 400, 0.1)]})
    known.learn({1: [drawn(1, 1).expand(50, D)]})
    for task in range(2, TASKS):
        known.learn({task: [drawn(task, 50, spread=1 + task)]})
    assert refused(known, drawn(1, 1).expand(20, D)) == 0
    assert refused(known, drawn(1, 1).expand(20, D) * (1 + 1e-7)) == 0  # float32 means in another batch
    assert refused(known, alike) == 0
    assert refused(known, -10 * drawn(1, 20)) == 1


@pytest.mark.parametrize("shrinkage", [0.1, "auto"])
def test_about_the_quantile_of_every_task_is_refused_whenever_it_came(shrinkage):
    known = router(shrinkage=shrinkage, quantile=0.1)
    for task in range(TASKS):
        known.learn({task: [drawn(task, 1000)]})
    for task in range(TASKS):
        assert 0.03 < refused(known, drawn(task, 1000, seed=1)) < 0.2
        assert refused(known, drawn(task, 200, 3.0, seed=1)) > 0.95


def test_a_removed_task_moves_no_floor():
    known = router()
    for task in range(TASKS):
        known.learn({task: [drawn(task, 50)]})
    before, peak = known.floors, known.namer.constant
    known.set_tasks([0, 2, 5])
    assert torch.equal(known.floors, before[[0, 2, 5]])
    known.learn({2: [drawn(2, 50, seed=1)]})
    assert torch.allclose(known.floors[0] - known.namer.constant, before[0] - peak, atol=1e-9)

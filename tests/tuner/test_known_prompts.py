"""Which prompts count as known: those as near to their task as its own prompts were, whatever was learned later."""

from __future__ import annotations

import pytest
import torch

from molora import DataError, RouterConfig
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
    known = router(shrinkage=shrinkage)
    known.learn({0: [drawn(0, 400, 0.1)]})
    known.learn({1: [drawn(1, 1).expand(50, D)]})
    for task in range(2, TASKS):
        known.learn({task: [drawn(task, 50, spread=1 + task)]})
    assert refused(known, drawn(1, 1).expand(20, D)) == 0
    assert refused(known, drawn(1, 1).expand(20, D) * (1 + 1e-7)) == 0  # float32 means in another batch
    assert refused(known, drawn(0, 200, 0.1, seed=1)) < 0.06
    assert refused(known, -10 * drawn(1, 20)) == 1


@pytest.mark.parametrize("shrinkage", [0.1, "auto"])
def test_about_the_quantile_of_every_task_is_refused_whenever_it_came(shrinkage):
    known = router(shrinkage=shrinkage, quantile=0.1)
    for task in range(TASKS):
        known.learn({task: [drawn(task, 1000)]})
    for task in range(TASKS):
        assert 0.03 < refused(known, drawn(task, 1000, seed=1)) < 0.2
        assert refused(known, drawn(task, 200, 3.0, seed=1)) > 0.95


@pytest.mark.parametrize("spreads", [[3.0] + 7 * [0.5], 7 * [0.5] + [3.0], [0.2, 1, 5, 0.2, 1, 5, 0.2, 1]])
def test_narrow_and_wide_tasks_stay_known_in_any_order(spreads):
    known = router()
    for task, spread in enumerate(spreads):
        known.learn({task: [drawn(task, 500, spread)]})
    for task, spread in enumerate(spreads):
        assert refused(known, drawn(task, 500, spread, seed=1)) < 0.06
    assert refused(known, drawn(0, 100, 10 * spreads[0], seed=2)) > 0.9


@pytest.mark.parametrize(("count", "most"), [(3, 0.5), (10, 0.25), (30, 0.1), (100, 0.04)])
def test_few_prompts_refuse_few_of_their_own(count, most):
    """One more prompt is further off than all of so many once in count + 1 times, whatever `quantile` asks for."""
    known = router()
    known.learn({task: [drawn(task, count)] for task in range(TASKS)})
    shares = [refused(known, drawn(task, 200, seed=1)) for task in range(TASKS)]
    assert sum(shares) / TASKS < most


def test_one_prompt_of_a_task_refuses_nothing():
    known = router()
    known.learn({0: [drawn(0, 1)]})
    assert refused(known, drawn(0, 50, 9.0)) == 0 and known.floors.isfinite().all()
    known.learn({0: [drawn(0, 100, seed=1)], 1: [drawn(1, 100)]})
    assert refused(known, drawn(0, 50, 9.0)) > 0.9 and refused(known, drawn(1, 50, 9.0)) > 0.9


def test_a_prompt_with_a_centre_of_its_own_tells_how_unlike_others_may_be():
    """Left out, it is as far as the nearest other centre; most prompts are the same text."""
    known = router(kind="prototypes", clusters=3)
    alike, odd = drawn(0, 1).expand(14, D), drawn(0, 2, seed=1)
    known.learn({0: [alike, odd[:1], odd[1:]], 1: [drawn(1, 40), drawn(1, 40, seed=1), drawn(1, 40, seed=2)]})
    assert refused(known, drawn(0, 100, seed=3)) < 0.5
    assert refused(known, -drawn(0, 20)) == 1


def test_more_prompts_of_a_task_never_narrow_what_is_known():
    known = router()
    known.learn({0: [drawn(0, 400)], 1: [drawn(1, 400)]})
    for seed in range(2, 6):
        known.learn({0: [drawn(0, 1, seed=seed)]})
    assert refused(known, drawn(0, 400, seed=9)) < 0.05


def test_the_order_of_prompts_does_not_move_what_is_known():
    """Such as ten templates in turn, one of them unlike the others."""
    rows, floors = drawn(0, 200), []
    rows[::10] += 4
    for start in range(10):
        known = router(quantile=0.02)
        known.learn({0: [rows.roll(start, dims=0)]})
        floors.append(float(known.floors[0]))
    assert max(floors) - min(floors) < 1e-6


def test_prompts_without_any_spread_are_known():
    row = drawn(0, 1).float().double()
    known = router()
    known.learn({0: [row.expand(53, D)], 1: [row.roll(1, dims=1).expand(53, D)]})
    assert refused(known, row.expand(3, D)) == 0 and refused(known, row.roll(1, dims=1) * (1 + 1e-7)) == 0
    assert refused(known, row + 100) == 1


@pytest.mark.parametrize("kind", ["gaussian", "ridge", "prototypes"])
def test_left_out_distances_are_those_without_the_prompt(kind):
    """Against the statistics of all but one, shrunk and counted as with it."""
    known = router(kind=kind, shrinkage=0.1)
    rows = known.kind.prepared(drawn(0, 20))
    known.learn({0: [rows], 1: [drawn(1, 30)]})
    namer, statistics = known.namer, known.statistics
    rest = rows[1:]
    within = statistics.scatter - (rows - rows.mean(0)).t() @ (rows - rows.mean(0))
    within = within + (rest - rest.mean(0)).t() @ (rest - rest.mean(0))
    level = 0.1 * statistics.scatter.trace() / statistics.spread / D
    covariance = 0.9 * within / statistics.spread + level * torch.eye(D).double()
    found = namer.left_out(0, rows, [known.centres])[0]
    for i, mean in enumerate((rest.mean(0), statistics.means[known.centres])):
        apart = rows[0] - mean
        assert torch.allclose(found[i], apart @ torch.linalg.solve(covariance, apart) / 2, rtol=1e-9)


def test_learning_that_fails_changes_nothing():
    known = router(shrinkage=1e-300)
    with pytest.raises(DataError, match="too small for so few prompts"):
        known.learn({0: [drawn(0, 5)]})
    assert not known.counts.any() and not known.learned and known.means.isfinite().all()


def test_a_removed_task_moves_no_floor():
    known = router()
    for task in range(TASKS):
        known.learn({task: [drawn(task, 50)]})
    before = known.floors
    known.set_tasks([0, 2, 5])
    assert torch.equal(known.floors, before[[0, 2, 5]])

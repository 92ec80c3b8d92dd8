"""Naming tasks in closed form: against densities, discriminants and a regression over all data; order, split, removal."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from molora.calls.task_router import Gaussian, Prototypes, Ridge, TaskStatistics
from molora.config.choices import ROUTERS
from molora.errors import ConfigError

D, SIZES = 5, (40, 7, 23)
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def tasks():
    torch.manual_seed(0)
    mix = torch.randn(D, D, dtype=torch.float64)
    return [torch.randn(n, D, dtype=torch.float64) @ mix + 3 * torch.randn(D).double() for n in SIZES]


def learn(parts, rows=len(SIZES)):
    known = TaskStatistics.of(rows, D)
    for task, features in parts:
        known = known.learned(task, features)
    return known


def assert_same(one, other):
    for name in ("counts", "means", "scatter", "spread"):
        assert_close(getattr(one, name), getattr(other, name), **EXACT)


def within(tasks):
    """Covariance around the tasks' own means, by the book."""
    rest = torch.cat([x - x.mean(dim=0) for x in tasks])
    return rest.t() @ rest / len(rest)


def test_statistics_are_what_they_say(tasks):
    known = learn(enumerate(tasks))
    assert known.counts.tolist() == [*SIZES] and known.spread == sum(SIZES)
    assert_close(known.means, torch.stack([x.mean(dim=0) for x in tasks]), **EXACT)
    assert_close(known.scatter / sum(SIZES), within(tasks), **EXACT)


def test_any_order_and_any_split_give_the_same_statistics(tasks):
    whole = learn(enumerate(tasks))
    assert_same(learn([(t, tasks[t]) for t in (2, 0, 1)]), whole)
    split = [(t, part) for t, x in enumerate(tasks) for part in x.split(3)]
    assert_same(learn(split[::-1]), whole)
    assert_same(learn([*split, (0, tasks[0][:0])]), whole)


def test_two_sets_of_statistics_merge(tasks):
    first = learn((t, x[: len(x) // 2]) for t, x in enumerate(tasks) if t < 2)
    second = learn((t, x[len(x) // 2 :] if t < 2 else x) for t, x in enumerate(tasks))
    assert_same(first.merged(second), learn(enumerate(tasks)))
    assert_same(second.merged(first), learn(enumerate(tasks)))


def test_a_removed_task_leaves_the_scatter_only(tasks):
    known = learn(enumerate(tasks)).rows([0, 2, None])
    never = learn([(0, tasks[0]), (1, tasks[2])])
    assert_same(TaskStatistics(never.counts, never.means, known.scatter, known.spread), known)
    assert known.spread == sum(SIZES)
    assert_same(known.learned(2, tasks[1]).rows([0, 2, 1]).rows([0, 2, 1]), known.learned(2, tasks[1]))


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_densities_are_those_of_normal_distributions(tasks, shrinkage):
    covariance = within(tasks)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / D * torch.eye(D).double()
    x = torch.cat(tasks)
    expected = torch.stack(
        [MultivariateNormal(t.mean(dim=0), covariance_matrix=shrunk).log_prob(x) for t in tasks], dim=1
    )
    named = Gaussian(learn(enumerate(tasks)), shrinkage)
    assert_close(named.log_densities(x), expected, atol=1e-8, rtol=1e-8)
    assert_close(named.posteriors(x), expected.softmax(dim=1), atol=1e-8, rtol=1e-8)


def test_posteriors_are_those_of_a_linear_discriminant(tasks):
    covariance = within(tasks)
    inverse = torch.linalg.inv(0.9 * covariance + 0.1 * covariance.trace() / D * torch.eye(D).double())
    means, x = torch.stack([t.mean(dim=0) for t in tasks]), torch.cat(tasks)
    scores = x @ inverse @ means.t() - (means @ inverse * means).sum(dim=1) / 2
    named = Gaussian(learn(enumerate(tasks)), 0.1)
    assert_close(named.posteriors(x), scores.softmax(dim=1), atol=1e-8, rtol=1e-8)


def test_ridge_is_the_solution_over_all_data(tasks):
    x, known = torch.cat(tasks), learn((t, part) for t, f in enumerate(tasks) for part in f.split(4))
    y = torch.nn.functional.one_hot(torch.arange(3).repeat_interleave(torch.tensor(SIZES))).double()
    penalty = 0.1 * within(tasks).trace() * len(x) / D * torch.eye(D + 1).double()
    penalty[-1, -1] = 0  # the intercept
    wide = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    solution = torch.linalg.solve(wide.t() @ wide + penalty, wide.t() @ y)
    named = Ridge(known, 0.1)
    assert_close(torch.cat([named.weight, named.bias.unsqueeze(0)]), solution, atol=1e-8, rtol=1e-8)
    assert_close(named.scores(x), wide @ solution, atol=1e-8, rtol=1e-8)
    assert_close(named.posteriors(x).sum(dim=1), torch.ones(len(x)).double())
    assert_close(named.log_densities(x), Gaussian(known, 0.1).log_densities(x))


@pytest.mark.parametrize("shrinkage", [0.1, "auto"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_one_sample_of_each_task_is_enough(kind, shrinkage):
    points = torch.eye(D)[:3]
    named = ROUTERS[kind](learn((t, points[t : t + 1]) for t in range(3)), shrinkage)
    assert named.posteriors(points).argmax(dim=1).tolist() == [0, 1, 2]


def test_a_prototype_at_each_task_is_a_gaussian_of_it():
    known = learn((t, torch.randn(20, D, dtype=torch.float64) + 3 * t) for t in range(3))
    x = torch.randn(7, D, dtype=torch.float64)
    assert torch.equal(Prototypes(known, 0.1).log_densities(x), Gaussian(known, 0.1).log_densities(x))


def test_the_nearest_of_several_prototypes_decides():
    rows = learn((t, torch.randn(20, D, dtype=torch.float64) + t) for t in range(3)).rows([0, None, 1, 2])
    x = torch.randn(7, D, dtype=torch.float64)
    each = Gaussian(rows, 0.1).log_densities(x)
    expected = torch.stack([each[:, 0], each[:, 2:].amax(dim=1)], dim=1)  # the second row was never seen
    assert_close(Prototypes(rows, 0.1, centres=2).log_densities(x), expected)


@pytest.mark.parametrize("samples", [5, 50, 5000])
def test_automatic_shrinkage_is_the_oracle_approximating_one(samples):
    x = torch.randn(samples, D, dtype=torch.float64) * torch.arange(1, D + 1)
    known = learn([(0, x)])
    expected = pytest.importorskip("sklearn.covariance").OAS().fit(x.numpy())
    named = Gaussian(known, "auto")
    assert_close(float(named.shrinkage), expected.shrinkage_, atol=1e-10, rtol=1e-10)
    normal = MultivariateNormal(x.mean(dim=0), covariance_matrix=torch.from_numpy(expected.covariance_))
    assert_close(named.log_densities(x)[:, 0], normal.log_prob(x), atol=1e-8, rtol=1e-8)


def test_automatic_shrinkage_of_a_spread_that_says_nothing_is_the_whole():
    even = torch.cat([torch.eye(D), -torch.eye(D)])  # the same variance in every direction
    for x in (even, torch.zeros(3, D)):
        assert float(Gaussian(learn([(0, x)]), "auto").shrinkage) == 1


def test_full_shrinkage_measures_plain_distances():
    known = learn((t, torch.randn(20, D, dtype=torch.float64) * torch.arange(1, D + 1) + t) for t in range(3))
    x = torch.randn(50, D, dtype=torch.float64)
    nearest = torch.cdist(x, known.means).argmin(dim=1)
    assert torch.equal(Prototypes(known, 1.0).posteriors(x).argmax(dim=1), nearest)


def test_kinds_are_registered():
    assert [*ROUTERS] == ["gaussian", "ridge", "prototypes"]
    with pytest.raises(
        ConfigError, match="kind of router 'gausian' is not one of gaussian, ridge, prototypes"
    ):
        ROUTERS["gausian"]

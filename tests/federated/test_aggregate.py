"""The ways to make one adapter of several, on products in float64 and on what must not change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from molora.config.federated import AGGREGATORS
from molora.federated.aggregate import State, aggregate, stack

LAYER = "model.layer.molora_experts"
GATE = "model.layer.molora_gate.rows.weight"
WEIGHTS = [300, 100, 50]
ways = pytest.mark.parametrize("way", [*AGGREGATORS])


def state(seed: int, rank: int = 3, *, A: Tensor | None = None) -> dict[str, Tensor]:
    """Two experts between 7 and 6, and their gate, in float64."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, rank, 7, generator=draw, dtype=torch.float64)
    return {
        f"{LAYER}.A": drawn if A is None else A,
        f"{LAYER}.B": torch.randn(2, 6, rank, generator=draw, dtype=torch.float64),
        GATE: torch.randn(2, 7, generator=draw, dtype=torch.float64),
    }


def product(state: State) -> Tensor:
    return state[f"{LAYER}.B"] @ state[f"{LAYER}.A"]


def mean(values: Sequence[Tensor]) -> Tensor:
    """A loop, as written in the papers."""
    total = torch.zeros_like(values[0])
    for weight, value in zip(WEIGHTS, values, strict=False):
        total = total + weight / sum(WEIGHTS[: len(values)]) * value
    return total


def fitting(way: str) -> list[dict[str, Tensor]]:
    """Three clients' states; of one A where the way wants it."""
    A = state(0)[f"{LAYER}.A"] if AGGREGATORS[way].keeps_A else None
    return [state(seed, A=A) for seed in (1, 2, 3)]


@ways
def test_one_client_and_equal_clients_change_nothing(way: str) -> None:
    one = fitting(way)[0]
    for states in ([one], [one, {key: value.clone() for key, value in one.items()}]):
        made = aggregate(way, one, states, WEIGHTS[: len(states)])
        assert made.lost < 1e-10
        torch.testing.assert_close(product(made.tensors), product(one), rtol=0, atol=1e-10)
        assert all(torch.equal(made.tensors[key], one[key]) for key in one)


@ways
def test_the_order_of_clients_does_not_matter(way: str) -> None:
    states, start = fitting(way), fitting(way)[0]
    one = aggregate(way, start, states, WEIGHTS).tensors
    other = aggregate(way, start, states[::-1], WEIGHTS[::-1]).tensors
    torch.testing.assert_close(product(one), product(other), rtol=0, atol=1e-10)
    torch.testing.assert_close(one[GATE], other[GATE], rtol=0, atol=1e-10)


def test_fedavg_is_the_mean_of_every_tensor() -> None:
    states = fitting("fedavg")
    made = aggregate("fedavg", states[0], states, WEIGHTS).tensors
    for key in states[0]:
        torch.testing.assert_close(made[key], mean([s[key] for s in states]), rtol=0, atol=1e-12)


def test_ffa_is_exact_on_products_and_is_flora_where_A_is_shared() -> None:
    states = fitting("ffa")
    exact = mean([product(s) for s in states])
    for way in ("ffa", "flora"):
        made = aggregate(way, states[0], states, WEIGHTS)
        torch.testing.assert_close(product(made.tensors), exact, rtol=0, atol=1e-10)
        assert made.lost < 1e-7
    assert torch.equal(
        aggregate("ffa", states[0], states, WEIGHTS).tensors[f"{LAYER}.A"], states[0][f"{LAYER}.A"]
    )


def test_stacking_is_exact_for_unequal_ranks() -> None:
    states = [state(1, 2), state(2, 5), state(3, 1)]
    parts = [(s[f"{LAYER}.A"], s[f"{LAYER}.B"]) for s in states]
    for expert in range(2):
        made = stack(parts, [w / sum(WEIGHTS) for w in WEIGHTS], expert)
        assert made.rank == 8
        exact = mean([product(s) for s in states])[expert]
        torch.testing.assert_close(made.matrix(), exact, rtol=0, atol=1e-10)


def test_flora_folds_to_the_nearest_product_of_the_starts_rank_and_says_what_that_cost() -> None:
    states = [state(1, 2), state(2, 5), state(3, 1)]
    made = aggregate("flora", state(0, 3), states, WEIGHTS)
    exact = mean([product(s) for s in states])
    values = torch.linalg.svdvals(exact)
    lost = values[:, 3:].square().sum().sqrt() / values.square().sum().sqrt()
    assert made.lost == pytest.approx(float(lost), abs=1e-10) and made.lost > 0.1
    error = torch.linalg.matrix_norm(product(made.tensors) - exact)
    torch.testing.assert_close(error, values[:, 3:].square().sum(1).sqrt(), rtol=0, atol=1e-10)


def test_what_flora_folds_can_still_learn_in_every_dimension() -> None:
    """Directions in which nobody learned have a zero in B alone: with both factors zero no gradient comes back."""
    start, states = state(0, 3), [state(1, 1), state(2, 1)]
    for one in states:
        one[f"{LAYER}.B"][1] = 0
    made = aggregate("flora", start, states, [1, 1]).tensors
    assert bool(made[f"{LAYER}.A"].any(-1).all())
    assert not made[f"{LAYER}.B"][1].any()


def test_an_experts_padding_stays_zero() -> None:
    start = state(0, 3)
    start[f"{LAYER}.A"][1, 2] = 0
    start[f"{LAYER}.B"][1, :, 2] = 0
    made = aggregate("flora", start, fitting("flora"), WEIGHTS).tensors
    assert not made[f"{LAYER}.A"][1, 2].any() and not made[f"{LAYER}.B"][1, :, 2].any()
    assert made[f"{LAYER}.A"][0].any(-1).all()

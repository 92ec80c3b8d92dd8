"""Tensor trains: the published sizes, products that reach any matrix, and the form of one train for the whole update."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from molora import GateConfig, MoLoraConfig
from molora.errors import ConfigError
from molora.experts.kinds.kind import Place
from molora.experts.kinds.tensor_train import TensorTrain, contracted, cores_of, dims_of, numbers_in
from tests.experts.test_kinds import banks, fill, forced, model_of
from tests.zoo import batch_for


@pytest.mark.parametrize(("width", "numbers"), [(768, 580), (1024, 640), (4096, 800)])
def test_a_factor_has_as_many_numbers_as_in_loretta(width, numbers):
    A, B = TensorTrain().trains(Place(width, width, 8))
    assert numbers_in(A) == numbers_in(B) == numbers < 8 * width / 10


@pytest.mark.parametrize("size", [1, 2, 13, 64, 96, 6144, 30_528, 3 * 1009, 151_936 * 8])
def test_dims_multiply_to_the_size_and_are_even(size):
    dims = dims_of(size)
    assert math.prod(dims) == size
    assert max(dims) <= max(32, max((p for p in range(2, 2000) if size % p == 0 and _prime(p)), default=1))


def _prime(number):
    return all(number % i for i in range(2, math.isqrt(number) + 1))


def test_a_train_of_full_rank_is_any_matrix():
    dims, rank = (4, 3, 2, 4), 24
    matrix = torch.randn(math.prod(dims), dtype=torch.float64)
    cores, left, rest = [], 1, matrix
    shapes = cores_of(dims, rank)
    for dim, (_, _, right) in zip(dims[:-1], shapes[:-1], strict=True):  # TT-SVD, padded to one rank
        U, S, Vh = torch.linalg.svd(rest.reshape(left * dim, -1), full_matrices=False)
        core = torch.zeros(rank if cores else 1, dim, right, dtype=torch.float64)
        core[:left, :, : len(S)] = U.view(left, dim, -1)
        cores.append(core)
        left, rest = len(S), S.unsqueeze(1) * Vh
    core = torch.zeros(rank, dims[-1], 1, dtype=torch.float64)
    core[:left, :, 0] = rest
    flat = torch.cat([core.flatten() for core in (*cores, core)])
    assert_close(contracted(flat[None], shapes)[0], matrix, atol=1e-10, rtol=1e-10)


def test_one_train_for_the_whole_update_has_rank_r_and_merges_exactly():
    settings = {"kind_settings": {"whole": 1, "tensor_rank": 3}, "r": 2}
    model = model_of("tensor_train", "top2-group", dtype=torch.float64, **settings)
    fill(model, 7)
    for bank in banks(model):
        place = bank.kind.place
        A, B = bank.kind.trains(place)
        assert A[0][0] == B[-1][2] == place.rank == 2 and A[-1][2] == B[0][0] == 1
        assert bank.stacks["A"].rows.shape == (3, numbers_in(A))
        assert torch.linalg.matrix_rank(bank.expert(0).delta()) == 2
    expected = forced(model, "expert_1")
    merged = model.merge_and_unload(expert_weights={"expert_1": 1.0})
    assert_close(merged(**batch_for("llama")).logits, expected, atol=1e-9, rtol=1e-9)


def test_a_new_train_has_the_spread_of_the_published_start():
    torch.manual_seed(0)
    kind = TensorTrain()
    place = Place(768, 768, 8)
    kind = kind.at(place, None)
    made = [kind.new(*place, init_A=lambda A: A) for _ in range(20)]
    A, B = kind.factors({name: torch.stack([rows[name] for rows in made]) for name in "AB"})
    assert A.shape == B.shape == (20, 8, 768) and not B.any()
    assert A.square().mean().sqrt().item() == pytest.approx((768 + 8) ** -0.5, rel=0.25)


def test_settings_of_trains_are_checked():
    gate = GateConfig(top_k=2)
    with pytest.raises(ConfigError, match=r"tensor_rank: is 0; allowed: 1 or more"):
        MoLoraConfig(kind="tensor_train", kind_settings={"tensor_rank": 0}, gate=gate)
    with pytest.raises(ConfigError, match=r"whole: is 2; allowed: 0"):
        MoLoraConfig(kind="tensor_train", kind_settings={"whole": 2}, gate=gate)
    with pytest.raises(ConfigError, match="experts of kind tensor_train have one rank"):
        MoLoraConfig(kind="tensor_train", expert_specs={"expert_0": {"r": 2, "lora_alpha": 2}})

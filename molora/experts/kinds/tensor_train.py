"""Tensor trains: an expert's factors as products of small cores, a few hundred numbers where a LoRA has thousands.

    a train over dims n_1 ... n_d:  M[i_1 ... i_d] = G_1[:, i_1] G_2[:, i_2] ... G_d[:, i_d],  G_k (R_{k-1}, n_k, R_k)

Two published forms. `whole: 0`, LoRETTA (its "rep"): each factor is a train of its own, A over the dims of d_in · rank and B over
those of d_out · rank, R_0 = R_d = 1. `whole: 1`, TT-LoRA: one train for the whole update, over the dims of d_out and then of
d_in; where it is cut between the two its rank is `r`, so it is a LoRA of that rank as well. All other R are `tensor_rank`.

Cores start as LoRETTA's, but for the last one of B, which is zero: there, an expert does not start at the base. Dims are
LoRETTA's where it lists them (hidden sizes 768, 1024, 4096 at rank 8), else prime factors spread over dims of about 8.

References: LoRETTA, arXiv:2402.11417; TT-LoRA, arXiv:2408.01008.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.config.section import Problem
from molora.experts.kinds.kind import About, Kind, Place, StackSpec

Core = tuple[int, int, int]

_PUBLISHED = {768 * 8: (8, 8, 12, 8), 1024 * 8: (4, 8, 8, 8, 4), 4096 * 8: (16, 16, 8, 4, 4)}
_USUAL = 8  # a dim of the published lists


def dims_of(size: int) -> tuple[int, ...]:
    """Dims whose product is `size`: as even as its prime factors allow, two of them or more."""
    count = max(2, round(math.log(size, _USUAL))) if size > 1 else 1
    dims = [1] * count
    for prime in sorted(_primes(size), reverse=True):
        dims[dims.index(min(dims))] *= prime
    return tuple(sorted((dim for dim in dims if dim > 1), reverse=True)) or (1,)


def _primes(number: int) -> list[int]:
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found + ([number] if number > 1 else [])


def cores_of(dims: Sequence[int], rank: int, first: int = 1, last: int = 1) -> list[Core]:
    """Shapes of a train's cores, all of whose inner ranks are `rank`."""
    ranks = [first, *[rank] * (len(dims) - 1), last]
    return [(ranks[i], n, ranks[i + 1]) for i, n in enumerate(dims)]


def numbers_in(cores: Sequence[Core]) -> int:
    """How many numbers a train has."""
    return sum(math.prod(core) for core in cores)


def contracted(flat: Tensor, cores: Sequence[Core]) -> Tensor:
    """The product of trains: (expert, first · Π dims · last), from their cores one after the other, (expert, number)."""
    parts = flat.split([math.prod(core) for core in cores], dim=1)
    product = parts[0].reshape(len(flat), -1, cores[0][2])
    for part, (left, dim, right) in zip(parts[1:], cores[1:], strict=True):
        # bmm: the bits of an expert do not depend on how many others there are.
        product = torch.bmm(product, part.reshape(-1, left, dim * right)).reshape(len(flat), -1, right)
    return product.reshape(len(flat), -1)


class TensorTrain(Kind):
    """One for each layer, whose sizes say what the cores are."""

    about = About(
        "LoRETTA, arXiv:2402.11417; with whole: 1 TT-LoRA, arXiv:2408.01008",
        "the cores of tensor trains whose product is A and B of each expert",
        "hundreds of numbers for an expert where LoRA has thousands: very many experts, or very little to send",
    )
    settings: ClassVar[Mapping[str, int | float]] = {"tensor_rank": 5, "whole": 0}
    starts_by_init = False
    by_layer = True
    one_rank = True
    imports = "its experts are products of small cores, which hold the factors of others only roughly"

    def specs(self) -> dict[str, StackSpec]:
        return {"A": StackSpec("number"), "B": StackSpec("number", role="B")}

    def trains(self, place: Place) -> tuple[list[Core], list[Core]]:
        """Shapes of the cores of A and of B at a layer."""
        inner, rank = int(self.chosen["tensor_rank"]), place.rank
        if self.chosen["whole"]:
            A = cores_of(dims_of(place.d_in), inner, first=rank)
            return A, cores_of(dims_of(place.d_out), inner, last=rank)
        sizes = (place.d_in * rank, place.d_out * rank)
        A, B = (cores_of(_PUBLISHED.get(size) or dims_of(size), inner) for size in sizes)
        return A, B

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        A, B = self.trains(Place(d_in, d_out, rank))
        last = math.prod(B[-1])
        rows = {"A": _started(A, d_in + rank), "B": _started(B, d_out + rank)}
        rows["B"][len(rows["B"]) - last :] = 0.0
        return rows

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.place is not None
        d_in, d_out, rank = self.place
        cores_A, cores_B = self.trains(self.place)
        A, B = contracted(rows["A"], cores_A), contracted(rows["B"], cores_B)
        A = A.view(-1, rank, d_in) if self.chosen["whole"] else A.view(-1, d_in, rank).mT
        return A, B.view(-1, d_out, rank).mT

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        yield from Kind.problems(mixture)
        given = {**cls.settings, **mixture["kind_settings"]}
        if given["tensor_rank"] < 1:
            yield ("kind_settings", "tensor_rank"), f"is {given['tensor_rank']}; allowed: 1 or more."
        if given["whole"] not in (0, 1):
            yield (
                ("kind_settings", "whole"),
                f"is {given['whole']}; allowed: 0 (a train for each factor), 1 (one for both).",
            )


def _started(cores: Sequence[Core], width: int) -> Tensor:
    """Cores from normal numbers, so that those of the product have a variance of 1 / width."""
    share = width ** (-0.5 / len(cores))
    return torch.cat([torch.randn(math.prod(core)) * share / math.sqrt(core[2]) for core in cores])

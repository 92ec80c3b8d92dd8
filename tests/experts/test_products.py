"""A weighted sum of experts as one expert: exact from the sum of their ranks on, the nearest below."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from molora.experts.kinds.kind import Expert
from molora.experts.products import weighed

D_IN, D_OUT, RANKS, SCALINGS, WEIGHTS = 9, 7, (2, 3), (2.0, 0.5), (0.25, 0.75)


def experts() -> list[Expert]:
    torch.manual_seed(0)
    return [
        Expert(torch.randn(r, D_IN, dtype=torch.float64), torch.randn(D_OUT, r, dtype=torch.float64), s)
        for r, s in zip(RANKS, SCALINGS, strict=True)
    ]


@pytest.mark.parametrize("rank", [5, 6, 12])
def test_from_the_sum_of_the_ranks_on_it_is_the_sum(rank: int) -> None:
    found = weighed(experts(), WEIGHTS, rank, 4.0)
    assert found.A.shape == (rank, D_IN) and found.B.shape == (D_OUT, rank) and found.scaling == 4.0
    exact = sum(w * e.delta() for w, e in zip(WEIGHTS, experts(), strict=True))
    assert_close(found.delta(), exact, atol=1e-12, rtol=1e-12)


def test_below_it_is_the_nearest_of_its_rank() -> None:
    exact = sum(w * e.delta() for w, e in zip(WEIGHTS, experts(), strict=True))
    U, S, V = torch.linalg.svd(exact)
    assert_close(
        weighed(experts(), WEIGHTS, 2, 4.0).delta(), U[:, :2] * S[:2] @ V[:2], atol=1e-12, rtol=1e-12
    )


def test_it_has_the_dtype_of_what_it_is_made_of() -> None:
    half = [e._replace(A=e.A.bfloat16(), B=e.B.bfloat16()) for e in experts()]
    found = weighed(half, WEIGHTS, 5, 1.0)
    assert found.A.dtype == found.B.dtype == torch.bfloat16
    exact = sum(w * e.delta() for w, e in zip(WEIGHTS, experts(), strict=True))
    assert_close(found.delta().double(), exact, atol=0.1, rtol=0.05)

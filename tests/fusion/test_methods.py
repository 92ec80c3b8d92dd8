"""Every method on products: against a loop in float64, PEFT's own functions on full matrices, and cases with a known answer."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils as theirs
from torch import Tensor
from torch.testing import assert_close

from molora.errors import ConfigError
from molora.experts.products import Product, balanced, factored, stacked, truncated
from molora.fusion.methods import FUSIONS, Call, default_weight, register_fusion, settings_of

OUT, IN, RANKS = 9, 7, (2, 3, 1)
WEIGHTS = [0.7, -0.4, 1.3]
RANDOM = ("dare", "dare_ties")


def products(count: int = 3, seed: int = 0) -> list[Product]:
    torch.manual_seed(seed)
    shapes = [(torch.randn(OUT, r).double(), torch.randn(r, IN).double()) for r in RANKS[:count]]
    return [Product(B, A) for B, A in shapes]


def matrix(made: Product | Tensor) -> Tensor:
    return made.matrix() if isinstance(made, Product) else made


def run(name: str, given: list[Product], weights: list[float], **settings: object) -> Tensor:
    draws = [torch.Generator().manual_seed(i) for i in range(len(given))]
    return matrix(FUSIONS[name].function(given, weights, Call(settings_of(name, settings), draws)))


def ties_by_a_loop(matrices: list[Tensor], weights: list[float], density: float, sign: str) -> Tensor:
    kept = []
    for m in matrices:
        floor = sorted(m.abs().flatten().tolist(), reverse=True)[int(density * m.numel()) - 1]
        kept.append([[v if abs(v) >= floor else 0.0 for v in row] for row in m.tolist()])
    made = torch.zeros_like(matrices[0])
    for i in range(OUT):
        for j in range(IN):
            column = [k[i][j] for k in kept]
            votes = sum(column) if sign == "total" else sum((v > 0) - (v < 0) for v in column)
            elected = 1 if votes >= 0 else -1
            used = [w * v for w, v in zip(weights, column, strict=True) if v * elected > 0]
            made[i, j] = sum(used) / max(1, len(used))
    return made


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_is_the_papers_three_steps(sign: str) -> None:
    given = products()
    want = ties_by_a_loop([p.matrix() for p in given], WEIGHTS, 0.5, sign)
    assert_close(run("ties", given, WEIGHTS, density=0.5, sign=sign), want)


@pytest.mark.parametrize("name", ["ties", "magnitude"])
def test_pefts_functions_on_products(name: str) -> None:
    given, weights = products(), torch.tensor(WEIGHTS, dtype=torch.float64)
    function = {"ties": theirs.ties, "magnitude": theirs.magnitude_prune}[name]
    want = function([p.matrix() for p in given], weights, 0.3)
    assert_close(run(name, given, WEIGHTS, density=0.3), want)


def test_dare_keeps_a_share_scales_it_up_and_is_right_on_average() -> None:
    given = products(1)
    whole, draws = given[0].matrix(), torch.Generator().manual_seed(0)
    call = Call(settings_of("dare", {"density": 0.4}), [draws])
    samples = torch.stack([matrix(FUSIONS["dare"].function(given, [1.0], call)) for _ in range(4000)])
    scaled = samples == whole / 0.4
    assert ((samples == 0) | scaled).all() and abs(scaled.double().mean() - 0.4) < 0.01
    assert (samples.mean(0) - whole).abs().max() < 0.1 * whole.abs().max()


def test_dare_ties_is_ties_of_what_dare_leaves() -> None:
    given = products()
    call = [torch.Generator().manual_seed(i) for i in range(3)]
    left = [
        p.matrix() * (torch.rand(OUT, IN, generator=g, dtype=torch.float64) < 0.6) / 0.6
        for p, g in zip(given, call, strict=True)
    ]
    mask = theirs.calculate_majority_sign_mask(torch.stack(left), "total")
    want = theirs.disjoint_merge(torch.stack([w * m for w, m in zip(WEIGHTS, left, strict=True)]), mask)
    assert_close(run("dare_ties", given, WEIGHTS, density=0.6), want)


@pytest.mark.parametrize("name", ["linear", "svd", "task_arithmetic"])
def test_sums_are_exact_with_negative_weights(name: str) -> None:
    given = products()
    want = sum(w * p.B @ p.A for w, p in zip(WEIGHTS, given, strict=True))
    assert_close(run(name, given, WEIGHTS), want)


@pytest.mark.parametrize("inner", ["linear", "task_arithmetic"])
def test_the_core_space_loses_nothing_of_a_sum(inner: str) -> None:
    given = products()
    assert_close(run("core_space", given, WEIGHTS, inner=inner), run(inner, given, WEIGHTS))


def test_the_core_space_is_the_releases_on_balanced_factors() -> None:
    """get_core_matrices of the release, and TIES of the cores."""
    given = products()
    even = [balanced(p) for p in given]
    Vh = torch.linalg.svd(torch.cat([p.A for p in even]), full_matrices=False)[2]
    U = torch.linalg.svd(torch.cat([p.B for p in even], dim=1), full_matrices=False)[0]
    cores = []
    for p in even:
        U_A, S_A, Vh_A = torch.linalg.svd(p.A, full_matrices=False)
        U_B, S_B, Vh_B = torch.linalg.svd(p.B, full_matrices=False)
        core = torch.diag(S_B) @ (Vh_B @ U_A) @ torch.diag(S_A)
        cores.append(U.T @ U_B @ core @ Vh_A @ Vh.T)
    want = U @ theirs.ties(cores, torch.tensor(WEIGHTS).double(), 0.5) @ Vh
    assert_close(run("core_space", given, WEIGHTS, density=0.5), want)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_a_method_sees_products_and_not_factors(name: str) -> None:
    given = products()
    mixing = [torch.randn(p.rank, p.rank).double() + 2 * torch.eye(p.rank).double() for p in given]
    other = [Product(p.B @ M, torch.linalg.inv(M) @ p.A) for p, M in zip(given, mixing, strict=True)]
    assert_close(run(name, given, WEIGHTS), run(name, other, WEIGHTS), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_one_expert_of_full_density_is_itself_and_so_are_equal_ones(name: str) -> None:
    one = products(1)
    settings = {"density": 1.0} if "density" in settings_of(name, {}) else {}
    assert_close(run(name, one, [1.0], **settings), one[0].matrix())
    weight = default_weight(name, settings_of(name, {}), 3)
    total = 3 if name == "task_arithmetic" else 1  # the sum, by its name
    assert_close(run(name, one * 3, [weight] * 3, **settings), total * one[0].matrix())


def test_a_cut_is_the_nearest_and_knows_what_it_lost() -> None:
    whole = stacked(products(), WEIGHTS)
    S = torch.linalg.svdvals(whole.matrix())
    for cut in (truncated(whole, 2), factored(whole.matrix(), 2)):
        assert cut.product.rank == 2
        assert_close((whole.matrix() - cut.product.matrix()).square().sum(), S[2:].square().sum())
        assert cut.lost == pytest.approx(float(S[2:].square().sum()))
        assert cut.whole == pytest.approx(float(S.square().sum()))
        assert_close(cut.product.B.norm(), cut.product.A.norm())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("tie", {}, "Did you mean 'ties'"),
        ("linear", {"density": 0.5}, "takes no 'density'"),
        ("ties", {"densty": 0.5}, "Did you mean 'density'"),
        ("ties", {"density": 0.0}, "density is 0.0"),
        ("dare", {"density": 1.5}, "density is 1.5"),
        ("ties", {"sign": "most"}, "sign is 'most'"),
        ("core_space", {"inner": "svd"}, "inner is 'svd'"),
        ("core_space", {"inner": "linear", "density": 0.5}, "takes no 'density'"),
    ],
    ids=str,
)
def test_what_a_method_does_not_take_is_refused(name: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings_of(name, given)


def test_a_method_of_ones_own() -> None:
    def first(given: list[Product], weights: list[float], call: Call) -> Product:
        return Product(given[0].B * call.settings["times"], given[0].A)

    register_fusion("first", first, settings={"times": 2.0})  # type: ignore[arg-type]
    try:
        assert_close(run("first", products(), WEIGHTS, times=3.0), 3 * products()[0].matrix())
        with pytest.raises(ConfigError, match="already"):
            register_fusion("first", first)  # type: ignore[arg-type]
    finally:
        FUSIONS.remove("first")

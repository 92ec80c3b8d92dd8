"""The methods of fusion: pure functions from products and weights to one product, or to the matrix it should be.

Names are PEFT's (`LoraModel.add_weighted_adapter`) where PEFT has the method. PEFT's `linear`, `ties`, `dare_linear`,
`dare_ties` and `magnitude_prune` work on A and B apart, so their result depends on how an expert is factored and has
cross terms B_i A_j; ours are those of its `*_svd` forms, on products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molora.config.suggest import options
from molora.errors import ConfigError
from molora.experts.products import Product, balanced, stacked
from molora.registry import Registry

SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Call:
    """What a method may use beside products and weights: its settings, and a generator of each product's own draws."""

    settings: Mapping[str, Any]
    generators: Sequence[torch.Generator] = ()


Function = Callable[[Sequence[Product], Sequence[float], Call], Product | Tensor]


@dataclass(frozen=True)
class Fusion:
    """A method. `settings` are those it takes, with defaults; `equal_sum` says what weights are where none are given."""

    function: Function
    settings: Mapping[str, Any] = field(default_factory=dict)
    equal_sum: bool = False  # weights left out are 1/n each, and not 1


FUSIONS: Registry[Fusion] = Registry("method of fusion")


def register_fusion(
    name: str, function: Function, *, settings: Mapping[str, Any] | None = None, equal_sum: bool = False
) -> None:
    """Make `molora.fuse(..., method=name)` mean a function of your own, in this process.

    Args:
        function: from products `B A` of one layer (float64, scaling in B), their weights and a `Call`, to a `Product`
            or a matrix (d_out, d_in). It is called for each layer, with the experts that have one there.
        settings: what it takes by keyword, with defaults; `Call.settings` holds them.
        equal_sum: weights left out are 1/n each; else 1.

    Raises:
        ConfigError: the name is taken, or is no name.
    """
    FUSIONS.add(name, Fusion(function, dict(settings or {}), equal_sum), source=function.__module__)


def settings_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings, those given in the place of its defaults; those of `inner` too where it has one.

    Raises:
        ConfigError: an unknown method, a setting that it does not take, or a value that is not allowed.
    """
    known = dict(FUSIONS[name].settings)
    if "inner" in known:
        inner = given.get("inner", known["inner"])
        allowed = [other for other in FUSIONS if other not in ("svd", "core_space")]
        if inner not in allowed:
            raise ConfigError(f"inner is {inner!r}.{options(inner, allowed)}")
        known |= FUSIONS[inner].settings
    for key in given:
        if key not in known:
            raise ConfigError(f"method {name} takes no {key!r}.{options(key, list(known))}")
    found = {**known, **given}
    density = found.get("density", 1.0)
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}; allowed: above 0, up to 1 (the share that is kept).")
    if found.get("sign", "total") not in SIGNS:
        raise ConfigError(f"sign is {found['sign']!r}.{options(found['sign'], SIGNS)}")
    return found


def default_weight(name: str, settings: Mapping[str, Any], count: int) -> float:
    """The weight of each of `count` experts where none is given."""
    return 1.0 / count if FUSIONS[settings.get("inner", name)].equal_sum else 1.0


def linear(products: Sequence[Product], weights: Sequence[float], call: Call) -> Product:
    """`sum_i w_i B_i A_i`, of the rank of all together. With weights of any sign: task arithmetic (arXiv:2212.04089)."""
    return stacked(products, weights)


def ties(products: Sequence[Product], weights: Sequence[float], call: Call) -> Tensor:
    """Trim, elect sign, disjoint mean (arXiv:2306.01708); the sign is elected before weights apply, as in PEFT."""
    return elected([_largest(p.matrix(), call.settings["density"]) for p in products], weights, call)


def magnitude(products: Sequence[Product], weights: Sequence[float], call: Call) -> Tensor:
    """The sum of what is largest in each (PEFT's magnitude_prune)."""
    kept = [_largest(p.matrix(), call.settings["density"]) for p in products]
    return torch.stack([w * matrix for w, matrix in zip(weights, kept, strict=True)]).sum(0)


def dare(products: Sequence[Product], weights: Sequence[float], call: Call) -> Tensor:
    """The sum of what is left when entries are dropped at random and the rest scaled up (arXiv:2311.03099)."""
    return torch.stack([w * m for w, m in zip(weights, _dropped(products, call), strict=True)]).sum(0)


def dare_ties(products: Sequence[Product], weights: Sequence[float], call: Call) -> Tensor:
    """DARE in the place of TIES' trimming."""
    return elected(_dropped(products, call), weights, call)


def core_space(products: Sequence[Product], weights: Sequence[float], call: Call) -> Product:
    """Another method on the small cores `U^T B_i A_i V`, U and V the bases that all B_i and A_i share (arXiv:2509.17786).

    Lossless for sums; the full matrix is never formed. Equal to the release (apanariello4/core-space-merging at 85176fa)
    on balanced factors; it takes U and V from the factors as they were trained, which are not the expert's alone: here
    each product is balanced first.
    """
    even = [balanced(p) for p in products]
    U = torch.linalg.svd(torch.cat([p.B for p in even], dim=1), full_matrices=False)[0]
    Vh = torch.linalg.svd(torch.cat([p.A for p in even]), full_matrices=False)[2]
    cores = [Product(U.mT @ p.B, p.A @ Vh.mT) for p in even]
    fused = FUSIONS[call.settings["inner"]].function(cores, weights, call)
    if isinstance(fused, Product):
        return Product(U @ fused.B, fused.A @ Vh)
    return Product(U @ fused, Vh)


def elected(matrices: Sequence[Tensor], weights: Sequence[float], call: Call) -> Tensor:
    """The weighted mean of those entries that agree with the sign elected at their place."""
    stack = torch.stack([*matrices])
    signs = stack.sign()
    votes = (stack if call.settings["sign"] == "total" else signs).sum(0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    scaled = stack * stack.new_tensor([*weights])[:, None, None]
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(matrix: Tensor, density: float) -> Tensor:
    """The matrix with all but the share `density` of largest entries set to zero."""
    kept = max(1, int(density * matrix.numel()))
    mask = torch.zeros_like(matrix).flatten()
    mask[matrix.abs().flatten().topk(kept).indices] = 1.0
    return matrix * mask.view_as(matrix)


def _dropped(products: Sequence[Product], call: Call) -> list[Tensor]:
    """Each matrix with entries kept at the rate `density`, and scaled by its inverse."""
    density, found = call.settings["density"], []
    for product, generator in zip(products, call.generators, strict=True):
        matrix = product.matrix()
        draws = torch.rand(matrix.shape, generator=generator, dtype=torch.float64)
        found.append(matrix * (draws < density) / density)
    return found


FUSIONS.add("linear", Fusion(linear, equal_sum=True))
FUSIONS.add("svd", Fusion(linear, equal_sum=True))  # cut to a rank, see fuse.py
FUSIONS.add("task_arithmetic", Fusion(linear))
FUSIONS.add("ties", Fusion(ties, {"density": 0.2, "sign": "total"}))
FUSIONS.add("dare", Fusion(dare, {"density": 0.5, "seed": 0}, equal_sum=True))
FUSIONS.add("dare_ties", Fusion(dare_ties, {"density": 0.5, "sign": "total", "seed": 0}))
FUSIONS.add("magnitude", Fusion(magnitude, {"density": 0.2}, equal_sum=True))
FUSIONS.add("core_space", Fusion(core_space, {"inner": "ties"}))

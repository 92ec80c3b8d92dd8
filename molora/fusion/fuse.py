"""fuse: several experts as one ordinary LoRA, by a registered method."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molora.config.suggest import options
from molora.disk.card import CONFIG_FILE
from molora.disk.out_folder import check_out
from molora.errors import ConfigError
from molora.experts.products import Cut, Product, factored, truncated
from molora.fusion.lora_out import Fused, check_fits, chosen_heads, write_lora
from molora.fusion.methods import FUSIONS, Call, default_weight, settings_of
from molora.fusion.sources import Folders, Source, check_alike, read_sources

Rank = int | Literal["full"] | None


def fuse(
    base: nn.Module | None,
    folders: Folders,
    *,
    out: str | os.PathLike[str],
    method: str = "linear",
    weights: Mapping[str, float] | None = None,
    rank: Rank = None,
    experts: Mapping[str, str] | None = None,
    tasks: Mapping[str, str] | None = None,
    heads: str | None = None,
    allow_other_base: bool = False,
    **settings: Any,
) -> Fused:
    """Write one LoRA folder, which stock PEFT loads, whose update is made of those of several experts.

    Ranks, alphas, scaling rules, patterns and targets may differ. Everything is computed in float64 on products
    `s B A`, never on A and B apart, and written in float32 with a scaling of 1.

    Args:
        base: the model of the LoRAs; with it, names and shapes are checked against its layers. It is not changed.
        folders: name -> LoRA folder, molora adapter folder or run.
        out: the folder to write: new, empty, or one that molora wrote, which is replaced atomically.
        method: linear, svd, task_arithmetic, ties, dare, dare_ties, magnitude, core_space, or a registered one.
        weights: of each source, of any sign; a source of weight 0 takes no part. None: 1 each, or 1/n for methods that
            are sums (linear, svd, dare, magnitude).
        rank: the result is the nearest of this rank, layer by layer; "full" cuts nothing. None: the sum of the sources'
            ranks, with which linear, task_arithmetic and core_space are exact; for svd the largest of them.
        experts, tasks: which part of a molora adapter or run is meant, by source.
        heads: the source whose trained heads (`modules_to_save`) go along, where sources have different ones.
        allow_other_base: load a molora source on a base with other weights than its own.
        settings: of the method: density, sign, seed, inner.

    Raises:
        ConfigError: unknown names or settings, or a folder that may not be written.
        AdapterError: a source that is no product of two factors (DoRA), is damaged, or belongs to another base.
    """
    given = settings_of(method, settings)
    if rank is not None and rank != "full" and (not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; allowed: a whole number from 1, or 'full'.")
    check_out(out, *folders.values(), mark=CONFIG_FILE)
    sources = read_sources(folders, experts, tasks, allow_other_base)
    shares = _weights(method, given, [source.name for source in sources], weights)
    check_alike(sources)
    if base is not None:
        check_fits(base, sources)
    kept = chosen_heads(sources, heads)
    cuts = fused(sources, shares, method, rank, given)
    made = {
        "method": method,
        "settings": given,
        "sources": [{**s.described(), "weight": w} for s, w in zip(sources, shares, strict=True)],
    }
    return write_lora(Path(out), base, sources, cuts, kept, made)


def fused(
    sources: Sequence[Source],
    weights: Sequence[float],
    method: str,
    rank: Rank,
    settings: Mapping[str, Any],
) -> dict[str, Cut]:
    """Layer -> its product, in float64; layers whose update is zero are left out. ConfigError where all are."""
    taking = [(s, w) for s, w in zip(sources, weights, strict=True) if w]
    found: dict[str, Cut] = {}
    for key in sorted({key for source, _ in taking for key in source.lora.factors}):
        here = [(s, w) for s, w in taking if key in s.lora.factors]
        products = [product(s, key) for s, _ in here]
        drawn = [_generator(settings, s.name, key) for s, _ in here]
        made = FUSIONS[method].function(products, [w for _, w in here], Call(settings, drawn))
        most = min(products[0].shape)
        ranks = [p.rank for p in products]
        limit = most if rank == "full" else rank or (max(ranks) if method == "svd" else sum(ranks))
        cut = _cut(made, min(limit, most))
        if cut.product.B.any() and cut.product.A.any():
            found[key] = cut
    if not found:
        raise ConfigError(
            "nothing is left of the update.", hint="give at least one expert a weight that is not 0."
        )
    return found


def product(source: Source, key: str) -> Product:
    """A source's update of one layer in float64, the scaling in B."""
    A, B = source.lora.factors[key]
    return Product(B.double() * source.lora.scaling(key), A.double())


def _cut(made: Product | Tensor, rank: int) -> Cut:
    if not isinstance(made, Product):
        return factored(made, rank)
    if made.rank > rank:
        return truncated(made, rank)
    return Cut(made, 0.0, float((made.B.mT @ made.B * (made.A @ made.A.mT)).sum()))


def _generator(settings: Mapping[str, Any], name: str, key: str) -> torch.Generator:
    """Draws that depend on the seed, the expert and the layer, and not on which others there are."""
    text = f"{settings.get('seed', 0)}/{name}/{key}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7]))


def _weights(
    method: str, settings: Mapping[str, Any], names: Sequence[str], given: Mapping[str, float] | None
) -> list[float]:
    if given is None:
        return [default_weight(method, settings, len(names))] * len(names)
    for name in given:
        if name not in names:
            raise ConfigError(f"weights names {name!r}.{options(name, names, 'Sources')}")
    if missing := [name for name in names if name not in given]:
        raise ConfigError(
            f"no weight for {', '.join(missing)}.", hint="give every source one, or none at all."
        )
    bad = [name for name in names if not math.isfinite(given[name])]
    if bad:
        raise ConfigError(f"the weight of {bad[0]} is {given[bad[0]]}; allowed: finite numbers.")
    return [float(given[name]) for name in names]

"""How alike the experts of an adapter are: the cosine of what they add to the weights, and the overlap of what they read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from molora.forward.mount import Mount, MountPoint

Pairs = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Similarity:
    """Between every two experts, averaged over the layers that have both.

    `cosine`: of their weight updates, -1 to 1; 0 where one of them adds nothing. `overlap`: of the subspaces that their A
    reads, 0 (orthogonal) to 1 (the smaller lies in the larger).
    """

    cosine: Pairs
    overlap: Pairs

    def alike(self, above: float = 0.95) -> list[tuple[str, str]]:
        """Pairs of experts that do nearly the same."""
        names = list(self.cosine)
        return [
            (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if self.cosine[a].get(b, 0.0) > above
        ]


@torch.no_grad()
def similarity(model: Any) -> Similarity | None:
    """Of the active adapter's experts; None where no layer has two.

    No weight update is built: `<B₁A₁, B₂A₂> = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ)`.
    """
    adapter = str(model.active_adapter)
    points = [module for module in model.modules() if isinstance(module, MountPoint)]
    mounts = [point.mounts[adapter] for point in points if adapter in point.mounts]
    cosine: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    overlap: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mount in mounts:
        names = _names(mount)
        if len(names) < 2:
            continue
        for table, values in zip((cosine, overlap), _layer(mount), strict=True):
            for i, a in enumerate(names):
                for j, b in enumerate(names):
                    table[a][b].append(float(values[i, j]))
    return Similarity(_means(cosine), _means(overlap)) if cosine else None


def _layer(mount: Mount) -> tuple[Tensor, Tensor]:
    """Cosines and overlaps (expert, expert) of one layer, in float64."""
    experts = mount.bank.experts()
    widest = max(expert.rank for expert in experts)
    A, B = (
        torch.stack([torch.nn.functional.pad(part.double(), (0, 0, 0, widest - len(part))) for part in parts])
        for parts in ([e.A for e in experts], [e.B.t() for e in experts])
    )
    reads = einsum(A, A, "e rank d_in, f r d_in -> e f rank r")
    writes = einsum(B, B, "e rank d_out, f r d_out -> e f rank r")
    scalings = torch.tensor([e.scaling for e in experts], dtype=torch.float64, device=A.device)
    products = (reads * writes).sum((-2, -1)) * torch.outer(scalings, scalings)
    lengths = products.diagonal().clamp(min=0).sqrt()
    cosines = products / torch.outer(lengths, lengths).clamp(min=torch.finfo(torch.float64).tiny)
    bases = torch.stack([_basis(row) for row in A])
    shared = einsum(bases, bases, "e d_in rank, f d_in r -> e f rank r").square().sum((-2, -1))
    dims = shared.diagonal().round()
    return cosines.clamp(-1, 1), shared / torch.minimum(dims[:, None], dims[None, :]).clamp(min=1)


def _basis(A: Tensor) -> Tensor:
    """Orthonormal columns (d_in, rank) of what an A (rank, d_in) reads; zero columns where its rank is lower."""
    _, sizes, rows = torch.linalg.svd(A, full_matrices=False)
    used = sizes > sizes.max().clamp(min=torch.finfo(torch.float64).tiny) * 1e-7
    found = (rows * used[:, None]).t()
    return torch.nn.functional.pad(found, (0, len(A) - found.shape[1]))


def _names(mount: Mount) -> tuple[str, ...]:
    return () if mount.plain else mount.task_map.experts


def _means(table: dict[str, dict[str, list[float]]]) -> Pairs:
    return {a: {b: round(sum(v) / len(v), 5) for b, v in row.items()} for a, row in table.items()}

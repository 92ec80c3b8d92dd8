"""VeRA: two vectors per expert between random projections that all experts, and all layers of a shape, share.

    B A  becomes  diag(b) B diag(d) A,  b (d_out) from 0, d (rank) from `d_initial`; A and B are never trained

The projections are not saved but drawn again from `projection_prng_key`, in PEFT's way (there, all layers share slices of
one pair of the largest shape; where targets have one shape the two are the same). b and d go into B, so x is multiplied
by A once for all experts. The scaling is 1 unless the config gives one.

Reference: VeRA, arXiv:2310.11454.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor, nn

from molora.errors import AdapterError
from molora.experts.kinds.kind import About, Kind, StackSpec
from molora.experts.stack import Stack


class Vera(Kind):
    """All banks of an adapter share one object of this class, and with it the projections."""

    about = About(
        "VeRA, arXiv:2310.11454",
        "two vectors of each expert (rank, d_out), between random projections that all experts and layers share",
        "many experts on little disk: give it a large rank (256), which costs numbers only in the shorter vector",
    )
    settings: ClassVar[Mapping[str, int | float]] = {"projection_prng_key": 0, "d_initial": 0.1}
    scaling = 1.0
    one_A = True
    starts_by_init = False
    imports = (
        "VeRA has two vectors for each expert between random projections, which hold no factors of others"
    )

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        super().__init__(share_A, **settings)
        self._projections: dict[tuple[str, int, int, int], Projection] = {}

    def specs(self) -> dict[str, StackSpec]:
        return {
            "A": StackSpec("rank d_in", shared=True, trained=False),
            "B": StackSpec("rank d_out", shared=True, trained=False),
            "d": StackSpec("rank"),
            "b": StackSpec("d_out", role="B"),
        }

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        A, B = (self._projection(name, d_in, d_out, rank).on(torch.device("cpu"))[0] for name in "AB")
        return {"A": A, "B": B, "d": torch.full((rank,), self.chosen["d_initial"]), "b": torch.zeros(d_out)}

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        B = einsum(rows["d"], rows["B"][0], rows["b"], "e rank, rank d_out, e d_out -> e rank d_out")
        return rows["A"], B

    def stack(self, name: str, rows: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Stack:
        if name not in "AB":
            return super().stack(name, rows, *args, **kwargs)
        (rank, d_in), d_out = rows["A"].shape, rows["B"].shape[1]
        return Drawn(self._projection(name, d_in, d_out, rank), *args, **kwargs)

    def _projection(self, name: str, d_in: int, d_out: int, rank: int) -> Projection:
        key = int(self.chosen["projection_prng_key"])
        shape = (name, d_in, d_out, rank)
        return self._projections.setdefault(shape, Projection(key, *shape))


class Drawn(Stack):
    """A projection in one bank. What is saved of it is its digest: other projections are never used without notice."""

    def __init__(self, projection: Projection, *args: Any, **kwargs: Any) -> None:
        self.__dict__["projection"] = projection  # needed before nn.Module is ready
        super().__init__(*args, **kwargs)

    def _block(self, rows: Tensor, *, learns: bool) -> nn.Parameter:
        return self.projection.on(rows.device)

    @property
    def whole(self) -> Tensor:
        return self.projection.digest.clone()  # files refuse tensors that share memory

    def fill(self, value: Tensor, *, replace: bool = False) -> None:
        """Compare digests; AdapterError where they differ."""
        if not torch.equal(value.detach().cpu().float(), self.whole):
            raise AdapterError(
                "the random projections made from this adapter's key are not those it was trained with.",
                hint="use the version of PyTorch that trained it; it draws other numbers from the same key.",
            )
        for name, block in [*self._parameters.items()]:
            if block is not None and block.is_meta:
                setattr(self, name, self.projection.on(value.device))


class Projection:
    """A (1, rank, d_in) or B (1, rank, d_out) of one shape of layer, one Parameter on each device."""

    def __init__(self, key: int, name: str, d_in: int, d_out: int, rank: int) -> None:
        self.key, self.name, self.d_in, self.d_out, self.rank = key, name, d_in, d_out, rank
        self._made: list[nn.Parameter] = []

    @cached_property
    def digest(self) -> Tensor:
        """sha256 of the numbers as drawn, whatever became of their dtype; bytes are exact in every floating-point type."""
        digest = hashlib.sha256(self._drawn().view(-1).view(torch.uint8).numpy().tobytes()).digest()
        return torch.tensor(list(digest), dtype=torch.float32)

    def on(self, device: torch.device) -> nn.Parameter:
        """The Parameter on that device; one that moved there with its model will do."""
        for parameter in self._made:
            if parameter.device == device:
                return parameter
        self._made.append(nn.Parameter(self._drawn().to(device), requires_grad=False))
        return self._made[-1]

    def _drawn(self) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(self.key)
        A = _kaiming((self.rank, self.d_in), generator)
        return (A if self.name == "A" else _kaiming((self.d_out, self.rank), generator).t()).contiguous()[
            None
        ]


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)

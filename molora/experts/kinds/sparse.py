"""Sparse: LoRA experts of which only a share of the numbers is kept, chosen once and zero from then on.

    y = W x + s · (B ∘ M_B) (A ∘ M_A) x,  M of zeros and ones

After step `after` each factor of each expert keeps the share `keep` of its numbers with the best scores:

    magnitude  |w|                                        snip    |w ∂w|, how much the loss changes without it
    grasp      w ∘ (H ∂w), how much of the gradient's     random  drawn from `seed`
               squared norm goes with it (H the Hessian)

Four times the rank with keep: 0.25 has the numbers of one LoRA (the paper's Large-Sparse).
Ours: the paper scores before training and over all layers at once; there B is 0, and its scores would take away all of B, or
all there is. So experts are scored after a short training, each factor by itself; one that no token has reached yet waits.
H ∂w is a difference of two gradients of one batch, and the loss has no temperature.

References: SparseAdapter, arXiv:2210.04284; SNIP, arXiv:1810.02340; GraSP, arXiv:2002.07376.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.config.section import Problem
from molora.errors import ConfigError
from molora.experts.kinds.kind import About, Expert, Kind, StackSpec, Step
from molora.experts.kinds.lora import Lora

SCORES = ("magnitude", "snip", "grasp", "random")


def packed(mask: Tensor) -> Tensor:
    """Eight zeros or ones (..., n) in each number (..., ⌈n / 8⌉): bytes, which every floating-point type holds exactly."""
    short = -mask.shape[-1] % 8
    bits = torch.nn.functional.pad(mask.to(torch.float32), (0, short)).unflatten(-1, (-1, 8))
    return (bits * 2.0 ** torch.arange(8, device=mask.device)).sum(dim=-1)


def unpacked(numbers: Tensor, n: int) -> Tensor:
    """Undo `packed`: (..., n), 0 or 1 as uint8."""
    places = torch.arange(8, dtype=torch.uint8, device=numbers.device)
    return (numbers.to(torch.uint8).unsqueeze(-1) >> places & 1).flatten(-2)[..., :n]


class Sparse(Lora):
    """All banks of an adapter share one object of this class, which knows whose masks are drawn."""

    about = About(
        "SparseAdapter, arXiv:2210.04284",
        "a share of the numbers of A and B of each expert, chosen by their scores early in training",
        "a larger rank for the same numbers: r: 32 with keep: 0.25 instead of r: 8",
    )
    settings: ClassVar[Mapping[str, int | float | str]] = {
        "keep": 0.5, "scores": "magnitude", "after": 20, "seed": 0,
    }  # fmt: skip
    keeps_factors = False
    grows = False  # a mask is drawn over the whole of a factor

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        super().__init__(share_A, **settings)
        self._step = 0
        self._drawn: dict[str, list[int]] = {}  # by layer: the stamp of its masks, once all are drawn

    def specs(self) -> dict[str, StackSpec]:
        masks = {f"mask_{name}": StackSpec("rank byte", trained=False) for name in "AB"}
        return {**super().specs(), **masks}

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return self._dense(super().new(d_in, d_out, rank, init_A))

    def rows_of(self, expert: Expert) -> dict[str, Tensor]:
        return self._dense(super().rows_of(expert))

    @staticmethod
    def _dense(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {f"mask_{name}": packed(torch.ones_like(rows[name])).to(rows[name].dtype) for name in "AB"}
        return {**rows, **full}

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        A, B = (rows[name] * unpacked(rows[f"mask_{name}"], rows[name].shape[-1]) for name in "AB")
        return A, B

    def after_step(self, banks: Mapping[str, Any], at: Step) -> None:
        self._step = self._step + 1 if at.number is None else at.number
        after = int(self.chosen["after"])
        learning = {key: bank for key, bank in banks.items() if bank.trainable}
        if self._step >= after:
            self._draw(
                {key: bank for key, bank in learning.items() if not self._is_drawn(key, bank)}, at.loss
            )
        with torch.no_grad():
            for bank in learning.values():
                for name in "AB":
                    block = bank.stacks[name].trainable
                    masks = unpacked(bank.stacks[f"mask_{name}"].trainable, block.shape[-1])
                    block.masked_fill_(masks == 0, 0.0)

    def _is_drawn(self, key: str, bank: Any) -> bool:
        return self._drawn.get(key) == bank.stacks["mask_A"].stamp()

    def _draw(self, banks: Mapping[str, Any], loss: Callable[[], Tensor] | None) -> None:
        """Give masks to the learning experts of layers that have none yet, where there is something to score."""
        blocks = {(key, name): bank.stacks[name].trainable for key, bank in banks.items() for name in "AB"}
        waiting = {key: _waiting(bank) for key, bank in banks.items()}
        scores = self._scores(blocks, loss) if any(waiting.values()) else {}
        for key, bank in banks.items():
            for place in waiting[key] if scores else ():
                rank = bank.ranks[bank.trainable[place]]
                for name in "AB":
                    own = scores[key, name][place, :rank]
                    stack = bank.stacks[f"mask_{name}"]
                    with torch.no_grad():
                        stack.trainable[place, :rank] = packed(self._best(own)).to(stack.trainable)
            if not any(_full(bank, place) for place in range(len(bank.trainable))):
                self._drawn[key] = bank.stacks["mask_A"].stamp()

    def _best(self, scores: Tensor) -> Tensor:
        """Which numbers of a factor are kept: as many of the best as `keep` says."""
        count = max(1, round(self.chosen["keep"] * scores.numel()))
        kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        kept[scores.flatten().topk(count).indices] = True
        return kept.view_as(scores)

    def _scores(
        self, blocks: Mapping[tuple[str, str], Tensor], loss: Callable[[], Tensor] | None
    ) -> dict[tuple[str, str], Tensor]:
        """Of every number of these Parameters, by layer and factor; empty where there is no gradient to score by."""
        method = self.chosen["scores"]
        if method == "magnitude":
            return {place: block.detach().abs() for place, block in blocks.items()}
        if method == "random":
            return {place: self._random(place, block) for place, block in blocks.items()}
        if method == "snip":
            gradients = {place: block.grad for place, block in blocks.items() if block.grad is not None}
            if len(gradients) < len(blocks):
                return {}
            return {place: (blocks[place] * g).detach().abs() for place, g in gradients.items()}
        if loss is None:
            raise ConfigError(
                "kind sparse: scores: grasp looks at the loss of the last batch again, and nobody gave it.",
                hint="molora train does; a loop of your own calls after_step(model, step, total, loss=lambda: ...). "
                "Or take scores: snip, which needs gradients only.",
            )
        flows = gradient_flow([*blocks.values()], loss)
        return dict(zip(blocks, flows, strict=True))

    def _random(self, place: tuple[str, str], block: Tensor) -> Tensor:
        """The same on every process and device."""
        seed = zlib.crc32(f"{self.chosen['seed']} {place}".encode())
        drawn = torch.rand(block.shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(block.device)

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    @classmethod
    def undone(cls, settings: Mapping[str, Any], steps: int) -> str | None:
        after = settings["after"]
        return f"kind_settings.after is {after}: experts stay dense." if steps < after else None

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        yield from Kind.problems(mixture)
        given = {**cls.settings, **mixture["kind_settings"]}
        if given["scores"] not in SCORES:
            yield ("kind_settings", "scores"), f"is {given['scores']!r}; allowed: {', '.join(SCORES)}."
        if isinstance(given["keep"], (int, float)) and not 0 < given["keep"] < 1:
            yield ("kind_settings", "keep"), f"is {given['keep']}; allowed: between 0 and 1."
        if isinstance(given["after"], int) and given["after"] < 1:
            yield ("kind_settings", "after"), f"is {given['after']}; allowed: 1 or more."


def _full(bank: Any, place: int) -> bool:
    """Whether a learning expert has no mask yet: `keep` is below 1, so a drawn one has zeros."""
    rank = bank.ranks[bank.trainable[place]]
    n = bank.stacks["A"].trainable.shape[-1]
    return bool(unpacked(bank.stacks["mask_A"].trainable[place, :rank], n).all())


def _waiting(bank: Any) -> list[int]:
    """The learning experts without a mask that have learnt anything, by their places among those that learn."""
    B = bank.stacks["B"].trainable
    return [place for place in range(len(bank.trainable)) if B[place].any() and _full(bank, place)]


def gradient_flow(parameters: list[Tensor], loss: Callable[[], Tensor], size: float = 1e-3) -> list[Tensor]:
    """`w ∘ (H g)` of each Parameter: half of what the gradient's squared norm loses, to first order, where w becomes 0.

    Args:
        loss: of one batch, computed anew at each call; random numbers are the same in all of them.
        size: how far weights go along g for the difference, as a share of their norm.
    """
    before = [p.detach().clone() for p in parameters]
    g = _gradients(parameters, loss)
    norms = [torch.stack([t.detach().double().square().sum() for t in many]).sum() for many in (before, g)]
    if not norms[1]:
        return [torch.zeros_like(p) for p in before]
    step = float(size * (norms[0] / norms[1]).sqrt())
    ends = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for p, old, along in zip(parameters, before, g, strict=True):
                p.copy_(old + sign * step * along)
        ends.append(_gradients(parameters, loss))
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    return [old * (up - down) / (2 * step) for old, up, down in zip(before, *ends, strict=True)]


def _gradients(parameters: list[Tensor], loss: Callable[[], Tensor]) -> list[Tensor]:
    """Mean over processes."""
    cuda = {p.device.index for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng([index for index in cuda if index is not None]), torch.enable_grad():
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient, torch.distributed.ReduceOp.AVG)
    return gradients

"""Gate: a short pipeline from what it reads to a Routing over experts. The scores are in `scores.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from molora.config.choices import NOISES, SELECTIONS, TRANSFORMS
from molora.config.gate import UNNORMALISED, GateSettings
from molora.experts.kernel import scores as exact_scores
from molora.gates import selection
from molora.gates.noise import Noise
from molora.gates.rows import GateRows
from molora.gates.selection import How, Selection, Transform
from molora.gates.starts import started


@dataclass
class Routing:
    """A gate's answer. Columns stand for `experts` (indices), or for all experts where that is None.

    Rows are tokens, samples (gates that read no tokens; with splits, one row for each), or one for everything.
    """

    weights: Tensor  # (tokens, expert): what the experts' outputs are multiplied by
    experts: tuple[int, ...] | None = None
    logits: Tensor | None = None  # (tokens, expert) float32; None where nothing is learned
    scores: Tensor | None = None  # (tokens, expert) what is transformed; -inf where forbidden
    transform: str = "softmax"
    dense: bool = False  # every expert is selected, its weight is its probability
    clean: Tensor | None = None  # (tokens, expert) logits before noise, where there is any
    gated: Tensor | None = None  # (tokens, gated expert): weights without the experts that are always on
    splits: int = 1
    threshold: Tensor | float | None = None  # (tokens, 1), or one for all, where that selects

    @property
    def decided(self) -> Tensor:
        """Weights (tokens, expert) of the experts the gate decides over."""
        return self.weights if self.gated is None else self.gated

    @property
    def probs(self) -> Tensor:
        """Probabilities (tokens, expert) before selection; computed when asked for, as losses and statistics do."""
        if self.dense or self.scores is None:
            return self.decided
        return selection.probabilities(self.scores, self.transform)

    @property
    def selected(self) -> Tensor:
        """Share (tokens, expert) of the token's slots given to each expert; rows sum to 1, no gradient."""
        if self.dense and self.transform not in UNNORMALISED:
            return self.decided.detach()
        chosen = (self.decided.detach() != 0).to(self.weights.dtype)
        return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)


@dataclass
class GatePlace:
    """Where a gate stands: all that differs between gates of the same settings."""

    d_in: int  # width of what it reads
    blocks: list[list[int]]  # the experts whose rows are one Parameter
    frozen: list[bool]  # by expert
    top_k: int = 1  # experts per row
    tasks: tuple[list[list[int]], list[bool]] | None = None  # both for its rows by task id, where it has them
    blend: float = 0.0  # logit at which the part of the second gate starts
    spread: bool = False  # whether a constant gate starts at random, not at equal weights

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self.frozen)

    @property
    def num_tasks(self) -> int:
        """How many task ids have a row."""
        return 0 if self.tasks is None else len(self.tasks[1])

    def rows(self, weight: Tensor) -> GateRows:
        """Rows of the experts, (expert, ...)."""
        return GateRows(weight, self.blocks, self.frozen)


class Gate(nn.Module):
    """A learned gate: score, noise, temperature, blend, mask, then transform, select and renormalise.

    A class per score (`scores.py`) makes the rows and what else it needs, and computes the logits; all the rest is
    here, or a function that the settings name. Arithmetic is float32 whatever the autocast dtype (float64 for float64
    inputs). Noise is drawn in training only. A gate reads the rows it is given and nothing else: no other sample, no
    later token.

    The names of its parts are those on disk; the order in which they are set is that of an optimiser's state.
    """

    rows: GateRows | None  # one row per expert; none for a task's table and for scores of users
    bias: GateRows | None  # one number per expert
    hidden: nn.Linear | None  # serves all experts, as do `threshold`, `blend` and `custom`
    threshold: nn.Linear | None  # a learned threshold: (tokens, d_in) -> (tokens, 1)
    tasks: GateRows | None  # one row per task id: its logits, or a vector that is scored
    second: GateRows | None  # one row per expert of the gate that is blended in, which reads the sequence
    blend: nn.Parameter | None  # logit of that gate's part
    custom: nn.Module | None  # a score of a user: (n, d_in) -> (n, expert)
    balance: Tensor | None

    from_products = False  # whether logits begin with the products of the rows and what the gate reads

    def __init__(self, settings: GateSettings, place: GatePlace) -> None:
        super().__init__()
        self.settings = settings
        self.top_k = place.top_k
        self.noise: Noise | None = None if settings.noise is None else NOISES[settings.noise]
        self.transform: Transform = TRANSFORMS[settings.transform]
        self.select: Selection = SELECTIONS[settings.select]
        self.frozen_shared = False
        self.rows = self.bias = self.hidden = self.tasks = self.custom = None
        self.make(place)
        self.threshold = nn.Linear(place.d_in, 1) if settings.threshold_learned else None
        self.second = self.blend = None
        if settings.blend == "sequence":
            self.second = place.rows(started(settings, place.num_experts, place.d_in))
            self.blend = nn.Parameter(torch.tensor(float(place.blend)))
        self.register_buffer("balance", torch.zeros(place.num_experts) if settings.balance_rate else None)

    def make(self, place: GatePlace) -> None:
        """Set the parts that the score needs, at their start."""
        raise NotImplementedError

    def score(self, x: Tensor, products: Tensor | None) -> Tensor:
        """Logits (rows, expert) of x, without the bias, in float32 or better; x and `products` as `forward` has them."""
        raise NotImplementedError

    @property
    def grown(self) -> list[GateRows]:
        """Everything that has one row per expert."""
        return [rows for rows in (self.rows, self.bias, self.second) if rows is not None]

    @property
    def renorm(self) -> str | None:
        """How kept weights are normalised. One of several is not: its weight would be 1, and the gate never learn."""
        alone = self.settings.select == "top_k" and self.top_k == 1
        return "none" if alone else self.settings.renorm

    @property
    def scores_x(self) -> bool:
        """Whether its logits begin with the products of its rows and x itself, which others may compute for it."""
        jitters = self.training and self.noise is not None and self.noise.on_input
        return self.from_products and self.settings.scope == "token" and not jitters

    def forward(
        self,
        x: Tensor,
        *,
        products: Tensor | None = None,
        experts: tuple[int, ...] | None = None,
        allowed: Tensor | None = None,
        balance: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Routing:
        """Weigh the experts.

        Args:
            x: (tokens, d_in); samples instead of tokens for a gate that reads those; (samples, task), the share
                of each task, for a task gate; anything for a constant one.
            products: (tokens, expert) products of the rows and x, where `scores_x` and somebody computed them.
            experts: restrict the gate to these expert indices for every token, renormalised over them.
            allowed: (tokens, expert) bool, the same per token over the columns of `experts`; rows must allow
                at least one expert.
            balance: (expert,) the balance to choose by, where it is not the present one.
            beside: (tokens, expert) or (1, expert) logits of the second gate, where one is blended in.
        """
        settings, noise = self.settings, self.noise if self.training else None
        disturbed = noise.add(x, settings.noise_std) if noise is not None and noise.on_input else x
        logits = self.score(disturbed, products)
        if self.bias is not None:
            logits = logits + self.bias.table().to(logits.dtype)
        if settings.absolute:
            logits = logits.abs()
        if allowed is not None or settings.splits > 1:
            logits, allowed = self._by_sample(logits, allowed)
        if experts is not None and len(experts) < logits.shape[-1]:
            logits, beside = logits[:, list(experts)], None if beside is None else beside[:, list(experts)]
        clean = None if noise is None else logits
        if noise is not None and not noise.on_input:
            logits = noise.add(logits, settings.noise_std)
        scores = logits if settings.temperature == 1.0 else logits / settings.temperature
        if beside is not None and self.blend is not None:
            logits = scores = blended(scores, beside / settings.temperature, self.blend, allowed)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        how = self._how(x, experts, allowed, balance)
        weights = self.select(scores, how)
        return Routing(
            weights, experts, logits, scores, settings.transform, settings.select == "dense", clean,
            splits=settings.splits, threshold=how.threshold,
        )  # fmt: skip

    def _by_sample(self, logits: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A row for each split; a constant gate has one for each sample, where they differ by what they may use."""
        splits = self.settings.splits
        if allowed is not None and len(logits) == 1:
            logits = logits.expand(len(allowed), -1)
        if splits > 1:
            logits = rearrange(logits, "n (splits expert) -> (n splits) expert", splits=splits)
            allowed = None if allowed is None else allowed.repeat_interleave(splits, dim=0)
        return logits, allowed

    def _how(
        self, x: Tensor, experts: tuple[int, ...] | None, allowed: Tensor | None, balance: Tensor | None
    ) -> How:
        settings = self.settings
        if balance is None and settings.balance_rate:
            balance = self.balance
        if balance is not None and experts is not None:
            balance = balance[list(experts)]
        threshold: Tensor | float | None = settings.threshold
        if self.threshold is not None and threshold is not None:  # `sigmoid(w x + b)` times the largest one
            threshold = threshold * affine(x, self.threshold).sigmoid()
        return How(settings, self.transform, self.top_k, self.renorm, threshold, balance, allowed)

    def apply_freeze(self) -> None:
        """Frozen parts stay frozen, whatever marked the adapter as trainable."""
        for rows in (*self.grown, self.tasks):
            if rows is not None:
                rows.apply_freeze()
        if self.frozen_shared:
            self._shared_requires_grad(False)

    def freeze_shared(self, frozen: bool) -> None:
        """Freeze or unfreeze what serves all experts."""
        self.frozen_shared = frozen
        self._shared_requires_grad(True)
        self.apply_freeze()

    def _shared_requires_grad(self, value: bool) -> None:
        for part in (self.hidden, self.threshold, self.custom, self.blend):
            if part is not None:
                part.requires_grad_(value)

    @torch.no_grad()
    def move_balance(self, shortfall: Tensor) -> None:
        """One step of loss-free balancing: up for experts with less than an even share, down for others.

        `shortfall`: (expert,) what each lacks of an even share; 0 for experts that were no choice. Reference: Wang et
        al., arXiv:2408.15664; with shares instead of counts, so that the number of tokens does not matter.
        """
        if self.balance is not None:
            shortfall = shortfall.to(self.balance)
            # Within a thousandth of even is even: the sign of rounding errors would only jitter.
            uneven = shortfall.abs() > 1e-3 / len(shortfall)
            self.balance += self.settings.balance_rate * shortfall.sign() * uneven

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The balance stays float32 on a 16-bit base: small steps would be rounded away."""
        before = self.balance
        super()._apply(fn, recurse)
        if before is not None and self.balance is not None and self.balance.dtype != before.dtype:
            there = self.balance.device
            lost = before.is_meta or self.balance.is_meta
            self.balance = self.balance.to(before.dtype) if lost else before.to(there)
        return self


def affine(x: Tensor, linear: nn.Linear) -> Tensor:
    """`W x + b` (rows, d_out) in float32 or better, whatever the autocast dtype."""
    product = exact_scores(x, [linear.weight])
    return product + linear.bias.to(product.dtype)


def blended(own: Tensor, beside: Tensor, blend: Tensor, allowed: Tensor | None) -> Tensor:
    """Logarithms of the mixed probabilities of two gates, (tokens, expert): their softmax is the mixture again.

    Args:
        own: (tokens, expert) scores of one; `beside`, which may have one row for all, those of the other.
        blend: the logit of the other's part.
        allowed: (tokens, expert) bool; each gate's probabilities are of the allowed experts.
    """
    if allowed is not None:
        # Finite: logaddexp of two -inf has no gradient.
        lowest = torch.finfo(own.dtype).min / 4
        own, beside = own.masked_fill(~allowed, lowest), beside.masked_fill(~allowed, lowest)
    blend = blend.to(own.dtype)
    return torch.logaddexp(
        own.log_softmax(dim=-1) + F.logsigmoid(-blend),
        beside.to(own.dtype).log_softmax(dim=-1) + F.logsigmoid(blend),
    )

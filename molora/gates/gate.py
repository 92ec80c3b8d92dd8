"""Gate: score, noise, transform, select, renormalise; returns a Routing over experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from molora.config.gate_rules import UNNORMALISED
from molora.experts.kernel import scores as exact_scores
from molora.gates import selection
from molora.gates.rows import GateRows

_SHORT = 1e-6  # lengths of x and row, multiplied, below which a cosine is 0


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


class GateSettings(Protocol):
    """The fields of GateConfig a gate reads."""

    scope: str
    pool: str
    blend: str
    score: str
    norm: str
    absolute: bool
    splits: int
    transform: str
    select: str
    top_k: int | list[int] | dict[str, int]
    top_p: float
    min_k: int
    threshold: float | None
    entropy_threshold: float
    entropy_index: float
    renorm: str | None
    balance_rate: float
    temperature: float
    noise: str | None
    noise_std: float
    init_std: float
    start: float

    @property
    def alone_is_one(self) -> bool: ...

    @property
    def by_sample(self) -> bool: ...


class Gate(nn.Module):
    """A learned gate: `transform((score + noise) / temperature)`, then select, then renormalise.

    Arithmetic is float32 whatever the autocast dtype (float64 for float64 inputs). Noise is drawn in
    training only. It reads the rows it is given and nothing else: no other sample, no later token.

    Args:
        settings: the axes.
        top_k: experts per row under `select: top_k`, where that differs by layer.
        rows: one row per expert; None for a task's table and for custom scores.
        bias: one number per expert.
        hidden: of score "mlp"; serves all experts, and is frozen once their rows are. So is `threshold`, a learned one.
        tasks: one row per task id: its logits (score "table") or its vector ("embedding").
        second: one row per expert of the gate that is blended in, which reads the pooled sequence.
        blend: logit of the second gate's part, where there is one.
        custom: a registered score: (n, d_in) -> (n, expert).
        num_experts: how many there are.
    """

    balance: Tensor | None

    def __init__(
        self,
        settings: GateSettings,
        rows: GateRows | None,
        *,
        top_k: int | None = None,
        bias: GateRows | None = None,
        hidden: nn.Linear | None = None,
        threshold: nn.Linear | None = None,
        tasks: GateRows | None = None,
        second: GateRows | None = None,
        blend: float = 0.0,
        custom: nn.Module | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        everywhere = settings.top_k if isinstance(settings.top_k, int) else 1
        self.top_k = everywhere if top_k is None else top_k
        self.rows = rows
        self.bias = bias
        self.hidden = hidden
        self.threshold = threshold
        self.tasks = tasks
        self.second = second
        self.blend = None if second is None else nn.Parameter(torch.tensor(float(blend)))
        self.custom = custom
        self.frozen_shared = False
        self.solo: int | None = None
        experts = num_experts or (rows.num_experts if rows is not None else 0)
        self.register_buffer("balance", torch.zeros(experts) if settings.balance_rate else None)
        plain = settings.score == "linear" or (settings.score == "cosine" and settings.norm == "unit")
        self._direct = settings.scope == "token" and plain

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
        return self._direct and not (self.training and self.settings.noise == "jitter")

    def apply_freeze(self) -> None:
        """Frozen parts stay frozen, whatever marked the adapter as trainable."""
        for rows in (*self.grown, *([] if self.tasks is None else [self.tasks])):
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
        """Route what the gate reads.

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
        settings = self.settings
        if self.solo is not None:
            return self._alone(x, products, experts)
        if (
            products is not None
            and settings.score == "linear"
            and self.bias is None
            and not settings.absolute
        ):
            logits = products
        else:
            logits = self._logits(x, products)
        if allowed is not None and len(logits) == 1:  # a constant gate: samples differ by what they may use
            logits = logits.expand(len(allowed), -1)
        if settings.splits > 1:
            logits = rearrange(logits, "n (splits expert) -> (n splits) expert", splits=settings.splits)
            allowed = None if allowed is None else allowed.repeat_interleave(settings.splits, dim=0)
        if experts is not None and len(experts) < logits.shape[-1]:
            logits = logits[:, list(experts)]
            beside = None if beside is None else beside[:, list(experts)]
        clean = None
        if settings.noise is not None and self.training:
            clean, logits = logits, self._noisy(logits)
        scores = logits if settings.temperature == 1.0 else logits / settings.temperature
        if beside is not None:
            logits = scores = self._blended(scores, beside / settings.temperature, allowed)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = self._select(x, scores, experts, self.balance if balance is None else balance, allowed)
        return Routing(
            weights, experts, logits, scores, settings.transform, settings.select == "dense", clean, splits=settings.splits
        )  # fmt: skip

    @torch.no_grad()
    def move_balance(self, missing: Tensor) -> None:
        """One step of loss-free balancing: up for experts with less than an even share, down for others.

        Args:
            missing: (expert,) what each lacks of an even share; 0 for experts that were no choice.

        Reference: Wang et al., arXiv:2408.15664; with shares instead of counts, so that the number of tokens
        does not matter.
        """
        if self.balance is not None:
            missing = missing.to(self.balance)
            # Within a thousandth of even is even: the sign of rounding errors would only jitter.
            self.balance += (
                self.settings.balance_rate * missing.sign() * (missing.abs() > 1e-3 / len(missing))
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The balance stays float32 on a 16-bit base: small steps would be rounded away."""
        before = self.balance
        super()._apply(fn, recurse)
        if before is not None and self.balance is not None and self.balance.dtype != before.dtype:
            there = self.balance.device
            lost = before.is_meta or self.balance.is_meta
            self.balance = self.balance.to(before.dtype) if lost else before.to(there)
        return self

    def _alone(self, x: Tensor, products: Tensor | None, experts: tuple[int, ...] | None) -> Routing:
        """The expert `solo` alone, weighted by the sigmoid of its row's product with x: how PHATGOOSE trains rows."""
        assert self.rows is not None
        logits = self.rows.logits(x) if products is None else products
        others = torch.arange(logits.shape[-1], device=logits.device) != int(self.solo or 0)
        weights = logits.sigmoid().masked_fill(others, 0.0)
        return Routing(weights if experts is None else weights[:, list(experts)], experts)

    def _logits(self, x: Tensor, products: Tensor | None) -> Tensor:
        settings = self.settings
        if settings.scope == "constant":
            assert self.rows is not None
            return self.rows.table()
        if self.tasks is not None:
            x = exact_scores(x.to(self.tasks.weight.dtype), [self.tasks.weight.t()])
            if settings.score == "table":
                return x
        elif settings.noise == "jitter" and self.training:  # on a copy: the experts read x as it is
            x = x * torch.empty_like(x).uniform_(1 - settings.noise_std, 1 + settings.noise_std)
        if self.custom is not None:
            with torch.autocast(x.device.type, enabled=False):
                return self.custom(x if x.dtype == torch.float64 else x.float())
        logits = self._scored(x, products)
        if self.bias is not None:
            logits = logits + self.bias.table().to(logits.dtype)
        return logits.abs() if settings.absolute else logits

    def _scored(self, x: Tensor, products: Tensor | None) -> Tensor:
        """Linear, mlp and cosine scores (tokens, expert)."""
        assert self.rows is not None
        if self.hidden is not None:
            inner = exact_scores(x, [self.hidden.weight])
            return self.rows.logits((inner + self.hidden.bias.to(inner.dtype)).relu())
        if self.settings.score == "cosine" and self.settings.norm == "layer":
            d_in = x.shape[-1]
            blocks = [_standard(block, d_in) for block in self.rows.blocks]
            return self.rows.in_order(exact_scores(_standard(x, d_in), blocks)) / math.sqrt(d_in)
        if products is None:
            products = self.rows.logits(x)
        if self.settings.score == "cosine":
            lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=products.dtype)
            rows = torch.linalg.vector_norm(self.rows.weight, dim=-1, dtype=products.dtype)
            product = lengths * rows
            # A vector without length has no direction, and no gradient: 1 / length would be one without bound.
            products = (products / product.clamp_min(_SHORT)).masked_fill(product < _SHORT, 0.0)
        return products

    def _blended(self, own: Tensor, beside: Tensor, allowed: Tensor | None) -> Tensor:
        """Logarithms of the mixed probabilities of both gates: their softmax is the mixture again."""
        assert self.blend is not None
        if allowed is not None:  # each gate's probabilities are of the allowed experts
            # Finite: logaddexp of two -inf has no gradient.
            lowest = torch.finfo(own.dtype).min / 4
            own, beside = own.masked_fill(~allowed, lowest), beside.masked_fill(~allowed, lowest)
        part = F.logsigmoid(self.blend.to(own.dtype)), F.logsigmoid(-self.blend.to(own.dtype))
        return torch.logaddexp(
            own.log_softmax(dim=-1) + part[1], beside.to(own.dtype).log_softmax(dim=-1) + part[0]
        )

    def _noisy(self, logits: Tensor) -> Tensor:
        noise, std = self.settings.noise, self.settings.noise_std
        if noise == "gaussian":
            return logits + torch.randn_like(logits) * std
        if noise == "jitter":  # is on x already
            return logits
        uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
        if noise == "gumbel":
            return logits - (-uniform.log()).log() * std
        return logits + torch.logit(uniform) * std

    def _select(
        self,
        x: Tensor,
        scores: Tensor,
        experts: tuple[int, ...] | None,
        balance: Tensor | None,
        allowed: Tensor | None,
    ) -> Tensor:
        settings = self.settings
        if settings.select == "top_k":
            if balance is not None and experts is not None:
                balance = balance[list(experts)]
            return selection.top_k_weights(scores, self.top_k, self.renorm, settings.transform, balance)
        probs = selection.probabilities(scores, settings.transform)
        if settings.select == "dense":
            return probs
        if settings.select == "hard":
            return selection.hard_weights(probs)
        if settings.select == "threshold":
            return selection.threshold_weights(probs, self._threshold(x), settings.renorm)
        if settings.select == "top_p":
            return selection.top_p_weights(probs, settings.top_p, settings.min_k, settings.renorm)
        return selection.entropy_weights(
            probs, settings.top_p, settings.min_k, settings.entropy_threshold, settings.entropy_index, settings.renorm,
            None if allowed is None else allowed.sum(dim=-1),
        )  # fmt: skip

    def _threshold(self, x: Tensor) -> Tensor | float:
        """The threshold in use: fixed, or `sigmoid(w x + b)` times the largest one, (tokens, 1)."""
        largest = self.settings.threshold
        assert largest is not None  # the config filled it in
        if self.threshold is None:
            return largest
        score = exact_scores(x, [self.threshold.weight])
        return largest * (score + self.threshold.bias.to(score.dtype)).sigmoid()


def _standard(values: Tensor, d_in: int) -> Tensor:
    """Rows with mean 0 and variance 1, in float32 or better."""
    with torch.autocast(values.device.type, enabled=False):
        return F.layer_norm(values.to(torch.promote_types(values.dtype, torch.float32)), (d_in,))

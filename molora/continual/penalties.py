"""Strategies that add a term to the loss: O-LoRA, N-LoRA and ELLA. Experts add up; only the newest learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molora.config.continual import StrategyConfig
from molora.continual.strategy import Strategy, Turn, expert_layers
from molora.experts.bank import ExpertBank
from molora.losses import orthogonal


class OLoRA(Strategy):
    """The new expert's subspace is kept orthogonal to those of all earlier ones.

    `coefficient · Σ_layers |A_old A_newᵀ|` (norm l1, what the authors run) or its squares (what the paper prints), on `A`,
    on `B` or on both; `l2 · Σ ‖p‖₂` over the new factors. Under a learned gate the coefficient is divided by the number
    of old experts, so that it does not grow with the sequence. Reference: O-LoRA, arXiv:2310.14152; unlike in the
    published code, the term does not depend on gradient accumulation.
    """

    def loss(self, model: nn.Module) -> Mapping[str, Tensor]:
        settings, terms, sizes = self.settings, [], []
        assert settings.norm and settings.factor, (
            "a strategy made from OLoRA has the settings norm and factor"
        )
        for _, layer, bank in expert_layers(model):
            if bank.frozen and bank.trainable:
                learned = layer.context.adapters[layer.active_adapters[0]].config.gate.scope != "constant"
                share = 1 / len(bank.frozen) if learned else 1.0
                terms += [share * orthogonal(new, old, settings.norm) for new, old in self._rows(bank)]
            sizes += [p.norm() for s in bank.stacks.values() for p in s.blocks if p.requires_grad]
        found = {}
        if terms and settings.coefficient:
            found["orthogonal"] = settings.coefficient * torch.stack(terms).sum()
        if sizes and settings.l2:
            found["l2"] = settings.l2 * torch.stack(sizes).sum()
        return found

    def _rows(self, bank: ExpertBank) -> list[tuple[Tensor, Tensor]]:
        """Rows of the new experts and of the old ones, of each factor that is to be kept apart."""
        stacks = [s for name, s in bank.stacks.items() if self.settings.factor in (name, "both")]
        return [
            (s.trainable.flatten(0, 1).float(), s.frozen.flatten(0, 1).float())
            for s in stacks
            if s.trainable is not None and s.frozen is not None
        ]


class NLoRA(Strategy):
    """The new expert's update is kept sparse, so that it seldom meets the old ones': `coefficient · Σ_layers ‖B A‖₁`.

    The size is that of the released code, which sums the r·r entries of the product in the other order, `‖A B‖₁`, and so
    needs layers as wide as they are high: see `sparsity`. Reference: N-LoRA, COLING 2025 (PKU-YuanGroup/N-LoRA at
    7301afe).
    """

    def loss(self, model: nn.Module) -> Mapping[str, Tensor]:
        terms = []
        for _, _, bank in expert_layers(model):
            experts = [bank.expert(e) for e in bank.trainable]
            terms += [sparsity(expert.A.float(), expert.B.float()) for expert in experts]
        return {"sparse": self.number("coefficient") * torch.stack(terms).sum()} if terms else {}


def sparsity(A: Tensor, B: Tensor) -> Tensor:
    """`r² √(d_in / r)` times the mean |entry| of the update B A: a scalar that does not depend on d_out.

    For factors of independent entries it is as large as `‖A B‖₁` of a square layer: the entries of A B are sums of
    d_in products, those of B A of r, so they are √(d_in / r) times larger, and there are r² of them.

    Args:
        A: (rank, d_in).
        B: (d_out, rank).
    """
    rank, d_in = A.shape
    return rank**1.5 * d_in**0.5 * (B @ A).abs().mean()


class Ella(Strategy):
    """The new update is kept away from the entries that old updates use: `coefficient · Σ_layers ‖ΔW ⊙ W_past‖²`.

    W_past is the sum of the frozen experts' updates. Reference: ELLA, arXiv:2601.02232; the coefficient, 5e6, is that
    of a third party's scripts.
    """

    def __init__(self, settings: StrategyConfig) -> None:
        super().__init__(settings)
        self._past: dict[str, Tensor] = {}

    def before_task(self, model: nn.Module, turn: Turn) -> None:
        self._past = {
            key: torch.stack([bank.expert(e).delta().detach().float() for e in bank.frozen]).sum(dim=0)
            for key, _, bank in expert_layers(model)
            if bank.frozen
        }

    def loss(self, model: nn.Module) -> Mapping[str, Tensor]:
        terms = []
        for key, _, bank in expert_layers(model):
            if key not in self._past:
                continue
            past = self._past[key].to(bank.stacks["B"].blocks[0].device)
            terms += [(bank.expert(e).delta().float() * past).square().sum() for e in bank.trainable]
        return {"ella": self.number("coefficient") * torch.stack(terms).sum()} if terms else {}

"""ORPO and SimPO: preferences that are measured from no other model.

ORPO: Hong et al., arXiv:2403.07691, the targets' own loss plus beta times that of the odds ratio. SimPO: Meng et al.,
arXiv:2405.14734. Formulas and rewards are those of TRL 1.16 (`ORPOTrainer.odds_ratio_loss`, `CPOTrainer.cpo_loss` with
loss_type simpo), on mean log-probabilities per token. Differs from TRL in one point: ORPO's own loss is that of the preferred
answer, where TRL counts the prompt too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.config.objective import ObjectiveConfig
from molora.training.preferences import Pairs, answer_lengths, log_probs


class ReferenceFree(Pairs):
    """A loss of the mean log-probability per token of both answers."""

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair (pairs,) from the means of both answers (pairs,)."""
        raise NotImplementedError

    def own_loss(self, chosen: Tensor, lengths: Tensor) -> Tensor:
        """What is added of the preferred answers alone; from their means (pairs,) and lengths in tokens (pairs,)."""
        return chosen.new_zeros(())

    def task_loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the pairs, and rewards as TRL names them."""
        lengths = answer_lengths(model, batch)
        chosen, rejected = (log_probs(model, batch) / lengths).chunk(2)
        loss = self.pair_loss(chosen, rejected).mean() + self.own_loss(chosen, lengths[: len(chosen)])
        return loss, self.rewards(chosen, rejected)


class Orpo(ReferenceFree):
    """`-log p(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected))`."""

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Beta times that of the odds ratio."""
        return -self.settings.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))

    def own_loss(self, chosen: Tensor, lengths: Tensor) -> Tensor:
        """The mean per target token, as the base computes it."""
        return -(chosen * lengths).sum() / lengths.sum()


class SimPo(ReferenceFree):
    """`-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - margin)`."""

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The same."""
        settings: ObjectiveConfig = self.settings
        return -F.logsigmoid(settings.beta * (chosen - rejected) - settings.margin)


def log_odds(log_p: Tensor) -> Tensor:
    """`log(p / (1 - p))` from log p < 0, also where p is nearly 1."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))

"""DPO: learn which of two answers is preferred, held to the model as it was before.

Rafailov et al., arXiv:2305.18290; ipo: Azar et al., arXiv:2310.12036; robust: Chowdhury et al., arXiv:2403.00409; hinge: Zhao
et al., arXiv:2305.10425. Formulas and names are those of TRL 1.16 (`DPOTrainer._compute_loss`), and so are the metrics.
`label_smoothing` with loss sigmoid is conservative DPO, which that version of TRL has no more.

The reference is the model before this training: earlier experts by the same routing, the new ones left out. It is no
second copy and nothing to save: what is frozen is what it was. Without earlier experts it is the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.calls.task_map import BASE_ONLY
from molora.config.objective import ObjectiveConfig
from molora.data.collate import collate_pairs
from molora.data.prompts import IGNORED
from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.training.objective import Companion, Objective, forward
from molora.tuner.api import routing
from molora.tuner.config import MoLoraConfig


class Pairs(Objective):
    """An objective of pairs of answers.

    Batches hold each pair's preferred answers in the first half, and the rejected ones in the same order in the second.
    """

    collate = staticmethod(collate_pairs)

    def __init__(self, companion: Companion | None = None, settings: ObjectiveConfig | None = None) -> None:
        super().__init__(companion)
        self.settings = settings or ObjectiveConfig(kind="dpo")

    @staticmethod
    def check_tasks(tasks: Sequence[Task]) -> None:
        """ConfigError for a task without rejected answers."""
        for task in tasks:
            if task.rejected is None:
                raise ConfigError(
                    f"data.tasks.{task.name}: has no rejected answers, which train.objective learns from.",
                    hint="give the task `target` (the preferred answer) and `rejected`, such as '{chosen}' and '{rejected}'.",
                )

    def rewards(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """Beta times these (pairs,), as TRL names them."""
        rewards = [self.settings.beta * one.detach() for one in (chosen, rejected)]
        margins = rewards[0] - rewards[1]
        return {
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).float().mean(),
        }

    def held_out(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean loss of held-out pairs, and how many they are."""
        pairs = len(batch["labels"]) // 2
        return self.task_loss(model, batch)[0], torch.tensor(pairs, device=batch["labels"].device)


class Preferences(Pairs):
    """`-log sigmoid(beta (log-ratio of the preferred - log-ratio of the rejected))`, or a variant of it."""

    def __init__(self, companion: Companion | None = None, settings: ObjectiveConfig | None = None) -> None:
        super().__init__(companion, settings)
        self._checked = False

    def task_loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the pairs, and rewards as TRL names them."""
        with nullcontext() if self.companion is None else self.companion.as_it_was(model):
            if not self._checked:
                check_reference(model, batch)
                self._checked = True
            with torch.no_grad(), as_before(model, batch) as given:
                before = log_probs(model, given)
        now = log_probs(model, batch)
        chosen, rejected = (now - before).chunk(2)
        loss = pair_loss(chosen, rejected, answer_lengths(model, batch), self.settings).mean()
        return loss, self.rewards(chosen, rejected)


def pair_loss(chosen: Tensor, rejected: Tensor, lengths: Tensor, settings: ObjectiveConfig) -> Tensor:
    """The loss of each pair (pairs,) from the log-ratios of both answers (pairs,).

    Args:
        lengths: (2 * pairs,) tokens of the preferred answers, then of the rejected ones.
    """
    beta, smooth = settings.beta, settings.label_smoothing
    delta = chosen - rejected
    if settings.loss in ("ipo", "sigmoid_norm"):
        of_chosen, of_rejected = lengths.to(chosen.dtype).chunk(2)
        delta = chosen / of_chosen - rejected / of_rejected
    if settings.loss == "ipo":
        return (delta - 1 / (2 * beta)) ** 2
    if settings.loss == "hinge":
        return torch.relu(1 - beta * delta)
    agreed, turned = -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
    if settings.loss == "robust":
        return ((1 - smooth) * agreed - smooth * turned) / (1 - 2 * smooth)
    return (1 - smooth) * agreed + smooth * turned


def log_probs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probability of each row's answer (rows,): the sum over its tokens, in float32 or better."""
    logits, labels = forward(model, **batch).logits, _predicted(model, batch["labels"])
    logits = logits[:, :-1] if _causal(model) else logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    taken = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return torch.where(labels != IGNORED, taken, 0.0).sum(dim=1)


def answer_lengths(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens each row's answer has (rows,), at least 1."""
    return (_predicted(model, batch["labels"]) != IGNORED).sum(dim=1).clamp(min=1)


@contextmanager
def as_before(model: Any, batch: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The model as it was before this training, in eval mode, and the batch to give it.

    Experts that learn are left out; where all do, the base alone answers.
    """
    config: MoLoraConfig = model.active_peft_config
    frozen = set(config.frozen_experts or ())
    learning = [name for name in config.expert_names or () if name not in frozen]
    training = model.training
    model.eval()
    try:
        if frozen:
            with routing(model, without=learning):
                yield batch
        else:
            yield {**batch, "routing_task_ids": batch["labels"].new_full((len(batch["labels"]),), BASE_ONLY)}
    finally:
        model.train(training)


def check_reference(model: Any, batch: Mapping[str, Tensor]) -> None:
    """ConfigError where the model as it was before depends on something that learns, so that it would move along."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad(), as_before(model, batch) as given:
        before = log_probs(model, given).sum()
    if not before.requires_grad:
        return
    gradients = torch.autograd.grad(before, list(learning.values()), allow_unused=True)
    moving = [name for name, g in zip(learning, gradients, strict=True) if g is not None and g.any()]
    if moving:
        raise ConfigError(
            f"train.objective: dpo measures from the model as it was before, which would move with {moving[0]}"
            f"{f' and {len(moving) - 1} more' if len(moving) > 1 else ''}.",
            hint="train a new expert on preferences (molora add-expert), and keep the others, their gate and heads frozen.",
        )


def _causal(model: Any) -> bool:
    """Whether a label stands one position after the logits that predict it."""
    return str(model.active_peft_config.task_type).endswith("CAUSAL_LM")


def _predicted(model: Any, labels: Tensor) -> Tensor:
    return labels[:, 1:] if _causal(model) else labels

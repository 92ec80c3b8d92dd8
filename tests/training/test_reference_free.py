"""ORPO and SimPO: their losses are TRL's, ORPO's own loss is the base's, and their settings act only with them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from molora.config.objective import ObjectiveConfig
from molora.training.preferences import Pairs, answer_lengths, log_probs
from molora.training.reference_free import Orpo, SimPo, log_odds
from tests.training.test_preferences import pairs_for
from tests.zoo import molora_model

CHOSEN = torch.tensor([-0.3, -2.0, -1e-4])
REJECTED = torch.tensor([-0.9, -0.1, -3.0])


def test_the_losses_are_trls() -> None:
    trl = pytest.importorskip(
        "trl.experimental.orpo.orpo_trainer", reason="needs trl: pip install molora[trl]"
    )
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="needs trl: pip install molora[trl]")
    device = SimpleNamespace(device=torch.device("cpu"))
    ours = Orpo(settings=ObjectiveConfig(kind="orpo", beta=0.3))
    theirs = trl.ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=device), CHOSEN, REJECTED)
    assert_close(ours.pair_loss(CHOSEN, REJECTED), -theirs[0], rtol=0, atol=1e-6)
    assert_close(ours.rewards(CHOSEN, REJECTED)["rewards/chosen"], theirs[1].mean())
    settings = SimpleNamespace(
        beta=2.0, simpo_gamma=0.8, label_smoothing=0.0, loss_type="simpo", alpha=0.0, accelerator=device
    )
    simpo = SimPo(settings=ObjectiveConfig(kind="simpo", beta=2.0, margin=0.8))
    wanted = cpo.CPOTrainer.cpo_loss(settings, CHOSEN, REJECTED)
    assert_close(simpo.pair_loss(CHOSEN, REJECTED), wanted[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Orpo, SimPo])
def test_a_better_answer_costs_less_and_the_expert_learns(kind: type[Pairs]) -> None:
    model, batch = molora_model("llama").train(), pairs_for()
    objective = kind(settings=ObjectiveConfig(kind=kind.__name__.lower()))
    loss, metrics = objective.loss(model, batch)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    with torch.no_grad():
        own = objective.task_loss(model.eval(), batch)[0]
        turned = objective.task_loss(model, {key: value.roll(2, 0) for key, value in batch.items()})[0]
        supervised = model(**{key: value[:2] for key, value in batch.items()}).loss
        means = (log_probs(model, batch) / answer_lengths(model, batch)).chunk(2)
    assert (own < turned) == (means[0].mean() > means[1].mean()) and own != turned
    if isinstance(objective, Orpo):
        assert_close(own - objective.pair_loss(*means).mean(), supervised, rtol=0, atol=1e-4)


def test_the_odds_of_a_certain_answer_are_finite() -> None:
    assert log_odds(torch.tensor([0.0, -1e-9])).isfinite().all()
    assert_close(log_odds(torch.tensor([0.25]).log()), torch.tensor([1 / 3]).log())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "dpo", "margin": 1.0}, "acts only with kind: simpo"),
        ({"kind": "orpo", "loss": "ipo"}, "acts only with kind: dpo"),
        ({"kind": "simpo", "label_smoothing": 0.1}, "acts only with kind: dpo"),
    ],
    ids=str,
)
def test_settings_act_only_with_their_kind(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveConfig.model_validate(given)

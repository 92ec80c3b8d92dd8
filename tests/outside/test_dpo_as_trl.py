"""DPO's loss, rewards and gradients are those of TRL's DPOTrainer on the same batch, with the base or earlier experts before."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from molora.config.objective import ObjectiveConfig
from molora.data.collate import collate_pairs
from molora.data.prompts import encode
from molora.data.tasks import Task
from molora.training.preferences import Preferences
from tests.outside.bases import TEXTS, base, mixture, tokenizer

trl = pytest.importorskip("trl", reason="needs TRL: pip install molora[trl]")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": text, "chosen": " yes" + "!" * i, "rejected": " no no"[: 4 + i % 3]}
    for i, text in enumerate(TEXTS[:4])
]
LOSSES: list[dict[str, Any]] = [
    {"loss": "sigmoid"}, {"loss": "sigmoid_norm", "beta": 2.0}, {"loss": "ipo"}, {"loss": "hinge"},
    {"loss": "robust", "label_smoothing": 0.2},
]  # fmt: skip


def randomised(model: Any, seed: int) -> Any:
    """Experts and gate that have learned something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ours(model: Any, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    task = Task("pairs", 0, train=PAIRS, target="{chosen}", rejected="{rejected}")
    words = tokenizer()
    batch = collate_pairs([encode(task, row, words, 64) for row in PAIRS], words.pad_token_id)
    del batch["routing_task_ids"]
    model.zero_grad()
    loss, metrics = Preferences(settings=ObjectiveConfig(kind="dpo", **settings)).loss(model, batch)
    loss.backward()
    return loss.detach(), metrics, gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def theirs(
    model: Any, settings: dict[str, Any], folder: Path, reference: Any
) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    arguments = trl.DPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_length=64, beta=settings.get("beta", 0.1),
        loss_type=settings["loss"], label_smoothing=settings.get("label_smoothing", 0.0), gradient_checkpointing=False,
        per_device_train_batch_size=len(PAIRS),
    )  # fmt: skip
    data = datasets.Dataset.from_list(PAIRS)
    model = deepcopy(model)  # TRL puts a head of its own on it
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=base(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    if isinstance(reference, PeftModel):  # TRL's head does not go on it: its numbers are given instead
        trainer.precompute_ref_logps = True
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = told(reference.eval(), batch).chunk(2)
    model.zero_grad()
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), metrics, gradients(model)


@torch.no_grad()
def told(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The log-probability of each row's answer."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)  # gates of sequence scope pool the prompt
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels).logits
    every = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (every * mask).sum(1)


def assert_same(mine: Any, other: Any) -> None:
    assert_close(mine[0], other[0], rtol=1e-6, atol=1e-6)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert float(mine[1][f"rewards/{name}"]) == pytest.approx(other[1][f"rewards/{name}"], abs=1e-5), name
    assert mine[2].keys() == other[2].keys() != set()
    for name, gradient in mine[2].items():
        assert_close(gradient, other[2][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: s["loss"])
def test_from_the_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = randomised(mixture("token", aux_losses={}), 1).train()
    assert_same(ours(model, settings), theirs(model, settings, tmp_path, base()))


@pytest.mark.parametrize("settings", LOSSES[:3], ids=lambda s: s["loss"])
@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_from_earlier_experts(tmp_path: Path, gate: str, settings: dict[str, Any]) -> None:
    """TRL is given the model before as a second copy; ours leaves the new expert out."""
    model = randomised(mixture(gate, aux_losses={}), 1)
    before = deepcopy(model)
    model.add_expert("late")
    randomised(model, 2).train()
    mine = ours(model, settings)
    assert_same(mine, theirs(model, settings, tmp_path, before))
    from_base = theirs(model, settings, tmp_path / "base", base())
    assert abs(float(mine[0] - from_base[0])) > 1e-3  # the bare base would be another reference

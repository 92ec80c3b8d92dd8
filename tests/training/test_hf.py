"""A stock transformers.Trainer, the mixin and a plain PyTorch loop train the same model, gate included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import molora
from molora.hf import KeepTaskIds, MoLoraTrainerMixin
from tests.zoo import TASKS, batch_for, gradients, molora_model

AUX = {"balance": 0.5}
ROWS = [{name: value[0] for name, value in batch_for("llama", batch=1, seed=i).items()} for i in range(8)]


class MoLoraTrainer(MoLoraTrainerMixin, Trainer):
    """What a user writes."""


def trainer_for(kind: type[Trainer], model: Any, folder: Path, **arguments: Any) -> Trainer:
    given = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    return kind(model=model, args=given, train_dataset=ROWS)


def gate_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "molora_gate" in name}


def gate_gradients(
    folder: Path, aux_losses: dict[str, float], accumulate: int, **arguments: Any
) -> dict[str, Tensor]:
    """Gate gradients of the mixin's first optimiser step over all eight rows."""
    seen: dict[str, Tensor] = {}

    class Recording(MoLoraTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            seen.update(gradients(self.model))
            return loss

    trainer_for(
        Recording, molora_model("llama", aux_losses=aux_losses), folder, max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate, max_grad_norm=0.0,
        **arguments,
    ).train()  # fmt: skip
    return {name: value for name, value in seen.items() if "molora_gate" in name}


@pytest.mark.parametrize("kind", [Trainer, MoLoraTrainer])
def test_a_trainer_trains_the_gate(kind: type[Trainer], tmp_path: Path) -> None:
    model = molora_model("llama", aux_losses=AUX)
    before = gate_parameters(model)
    trainer_for(kind, model, tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2).train()
    after = gate_parameters(model)
    assert before
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_stock_loss_contains_the_auxiliary_loss() -> None:
    model = molora_model("llama", aux_losses=AUX).train()
    with_aux = model(**batch_for("llama")).loss
    with molora.aux_in_loss(model, False):
        without = model(**batch_for("llama")).loss
    assert torch.allclose(with_aux, without + molora.aux_loss(model))
    assert with_aux > without


def test_the_mixin_weighs_auxiliary_losses_alike_under_accumulation(tmp_path: Path) -> None:
    # z is a mean over tokens, so its mean over equal parts of a batch is its mean over the batch: exact.
    def z_part(accumulate: int) -> dict[str, Tensor]:
        with_z = gate_gradients(tmp_path, {"z": 0.5}, accumulate)
        without = gate_gradients(tmp_path, {}, accumulate)
        return {name: with_z[name] - without[name] for name in with_z}

    whole = z_part(1)
    assert any(part.abs().max() > 1e-4 for part in whole.values())
    for accumulate in (2, 4):
        for name, part in z_part(accumulate).items():
            assert torch.allclose(part, whole[name], atol=1e-6), (accumulate, name)


def test_the_mixin_keeps_auxiliary_losses_under_label_smoothing(tmp_path: Path) -> None:
    with_z = gate_gradients(tmp_path, {"z": 0.5}, 1, label_smoothing_factor=0.1)
    without = gate_gradients(tmp_path, {}, 1, label_smoothing_factor=0.1)
    assert any((with_z[name] - without[name]).abs().max() > 1e-4 for name in with_z)


def test_the_mixin_asks_for_outputs_only_where_its_caller_does(tmp_path: Path) -> None:
    class WithoutOutputs(Trainer):  # as TRL's GRPOTrainer
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            if return_outputs:
                raise ValueError("no outputs")
            return model(**inputs)["logits"].sum() * 0.0

    class Mixed(MoLoraTrainerMixin, WithoutOutputs):
        pass

    model = molora_model("llama", aux_losses=AUX)
    before = gate_parameters(model)
    trainer_for(
        Mixed, model, tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2
    ).train()
    after = gate_parameters(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)  # by the auxiliary loss alone


def test_a_caller_that_does_not_read_the_loss_is_told_what_it_loses() -> None:
    with pytest.warns(
        UserWarning, match="MoLoraTrainerMixin"
    ):  # the keyword with which TRL's trainers call a model
        molora_model("llama", aux_losses=AUX).train()(**batch_for("llama"), fused_lm_head=True)


def test_a_collator_that_keeps_names_of_tasks(tmp_path: Path) -> None:
    model = molora_model("llama", "task-group", trained=False)
    trainer = trainer_for(
        MoLoraTrainer, model, tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2
    )
    rows = [{**row, "routing_task_ids": TASKS[i % 2]} for i, row in enumerate(ROWS)]
    trainer.train_dataset, trainer.data_collator = rows, KeepTaskIds(trainer.data_collator)
    trainer.train()
    B = next(p for name, p in model.named_parameters() if "lora_B" in name)
    assert [bool(expert.abs().sum()) for expert in B] == [True, True, False]


def test_a_plain_loop_trains_experts_and_gate() -> None:
    model = molora_model("llama", trained=False, aux_losses=AUX).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before, losses = gate_parameters(model), []
    for _ in range(8):
        loss = model(**batch_for("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = gate_parameters(model)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], after[name]) for name in before)

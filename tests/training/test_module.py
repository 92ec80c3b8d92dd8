"""MoLoraModule in a plain Lightning Trainer: accumulation, stages, adapter-only state, losses."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import molora
from molora.config import StageConfig, TrainConfig
from molora.errors import AdapterError, ConfigError
from molora.training.module import MoLoraModule
from tests.zoo import batch_for, molora_model

Batch = dict[str, Tensor]


def rows(count: int) -> list[Batch]:
    return [batch_for("llama", batch=1, seed=i) for i in range(count)]


def joined(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fit(
    model: Any, batches: list[Batch], steps: int, *, validation: Any = None, **settings: Any
) -> L.Trainer:
    """Train on `batches`, epoch after epoch, for `steps` optimiser steps."""
    chosen = TrainConfig(
        max_steps=steps, **{"lr": 1e-2, "warmup": 0, "schedule": "constant", "log_every": 1, **settings}
    )
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=chosen.accumulate, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(MoLoraModule(model.train(), chosen), loader, validation)
    return trainer


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("aux_losses", [{}, {"z": 0.5}])
def test_accumulated_batches_equal_one_large_batch(aux_losses: dict[str, float]) -> None:
    whole = molora_model("llama", aux_losses=aux_losses)
    parts = molora_model("llama", aux_losses=aux_losses)
    fit(whole, [joined(rows(4))], 2)
    fit(parts, rows(4), 2, accumulate=4)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], atol=1e-5), name


def test_a_short_last_window_has_full_weight() -> None:
    norms: dict[int, list[float]] = {}
    for accumulate, batches in ((1, rows(1)), (3, rows(1))):
        module_norms = norms.setdefault(accumulate, [])

        class Noting(L.Callback):
            def on_before_optimizer_step(
                self, trainer: Any, module: Any, optimizer: Any, to: Any = module_norms
            ) -> None:
                to.append(sum(float(p.grad.norm()) for g in optimizer.param_groups for p in g["params"]))

        model = molora_model("llama").train()
        chosen = TrainConfig(max_steps=1, accumulate=accumulate)
        trainer = L.Trainer(
            max_steps=1, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Noting()],
        )  # fmt: skip
        trainer.fit(MoLoraModule(model, chosen), torch.utils.data.DataLoader(batches, batch_size=None))
    assert norms[3] == pytest.approx(norms[1], rel=1e-5)


def test_a_stage_trains_only_its_parts() -> None:
    model = molora_model("llama", aux_losses={"balance": 0.1})
    before = weights(model)
    gates = {name for name in before if "molora_gate" in name}
    fit(model, rows(4), 2, stages=[StageConfig(train=["gates"])], weight_decay=0.1)
    after_gates = weights(model)
    assert {name for name in before if not torch.equal(before[name], after_gates[name])} == gates
    fit(model, rows(4), 2, stages=[StageConfig(train=["experts"])], gate_weight_decay=0.1)
    moved = {name for name in before if not torch.equal(after_gates[name], weights(model)[name])}
    assert moved == before.keys() - gates


def test_gates_rest_while_frozen_and_learn_afterwards() -> None:
    one, two = molora_model("llama"), molora_model("llama")
    stages = [StageConfig(steps=2, train=["experts"]), StageConfig(train=["experts", "gates"])]
    before = weights(one)
    gates = [name for name in before if "molora_gate" in name]
    fit(one, rows(4), 3, stages=stages)
    fit(two, rows(4), 2, stages=[StageConfig(train=["experts"])])
    assert all(torch.equal(before[name], weights(two)[name]) for name in gates)
    assert all(not torch.equal(before[name], weights(one)[name]) for name in gates)


def test_the_state_is_the_adapter_and_loading_is_strict() -> None:
    module = MoLoraModule(molora_model("llama"), TrainConfig(max_steps=1))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert state
    assert all("molora_" in name for name in state)
    other = MoLoraModule(molora_model("llama", seed=5), TrainConfig(max_steps=1))
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())

    first = next(iter(state))
    with pytest.raises(AdapterError, match="missing"):
        other.load_state_dict({name: value for name, value in state.items() if name != first})
    with pytest.raises(AdapterError, match="stranger: unknown"):
        other.load_state_dict({**state, "stranger": torch.zeros(1)})
    with pytest.raises(AdapterError, match="shape"):
        other.load_state_dict({**state, first: torch.zeros(1)})


def test_auxiliary_losses_are_in_the_training_loss_once_and_never_in_the_evaluation() -> None:
    batch = batch_for("llama")
    plain, mixed = molora_model("llama"), molora_model("llama", aux_losses={"balance": 0.5})
    module = MoLoraModule(mixed.train(), TrainConfig(max_steps=1))
    trained = module(**batch).loss
    assert torch.allclose(trained, plain(**batch).loss)  # the forward alone leaves them out
    assert molora.aux_losses(mixed)["balance"] >= 1
    module.eval()
    loss, count = module.objective.held_out(module.model, batch)
    assert torch.allclose(loss, plain(**batch).loss)
    assert count == batch["labels"].numel()


def test_a_user_can_monitor_the_validation_loss() -> None:
    model = molora_model("llama")
    trainer = fit(model, rows(2), 2, validation=torch.utils.data.DataLoader(rows(2), batch_size=None))
    assert trainer.callback_metrics["val_loss"].isfinite()
    assert trainer.callback_metrics["loss"].isfinite()
    assert trainer.callback_metrics["grad_norm"] > 0


def test_the_gradient_norm_is_logged_before_clipping() -> None:
    def norm(clip: float | None) -> float:
        return float(fit(molora_model("llama"), rows(1), 1, clip=clip).callback_metrics["grad_norm"])

    assert norm(1e-6) == pytest.approx(norm(None), rel=1e-6)


def test_a_batch_without_labels_teaches_nothing_and_breaks_nothing() -> None:
    """transformers' loss of such a batch is NaN, and one NaN in a window spoils all of it."""
    blank = batch_for("llama", batch=1, seed=9)
    blank["labels"] = torch.full_like(blank["labels"], -100)
    assert torch.isnan(molora_model("llama")(**blank).loss)
    only_first = {**blank, "labels": blank["labels"].clone()}
    only_first["labels"][:, 0] = 1  # which a causal model never predicts
    for nothing in (blank, only_first):
        with_blank, without = molora_model("llama"), molora_model("llama")
        before = weights(without)
        fit(with_blank, [nothing], 1)
        assert all(torch.equal(value, before[name]) for name, value in weights(with_blank).items())
        fit(with_blank, [rows(1)[0], nothing], 1, accumulate=2, clip=None)
        fit(without, [joined(rows(1))], 1, clip=None)
        # AdamW's first step has one size, whatever the gradient's, but for the smallest ones.
        for name, value in weights(without).items():
            assert torch.allclose(value, weights(with_blank)[name], atol=1e-3), name


def test_training_that_cannot_learn_stops_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = molora_model("llama")
    monkeypatch.setattr(MoLoraModule, "backward", lambda *_, **__: None, raising=False)
    with pytest.raises(ConfigError, match="no gradient reached experts, gates or heads at step 0"):
        fit(model, rows(1), 1)

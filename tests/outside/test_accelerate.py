"""accelerate: prepared mixtures accumulate exactly, resume bit-equal, and run with weights kept off the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

import molora
from tests.outside.bases import GATES, base, mixture, values

pytestmark = pytest.mark.slow

ROWS = torch.arange(3, 3 + 16 * 6).reshape(16, 6) % 250


def ready(accumulate: int = 1, batch: int = 2, *, gate: str = "token", **settings: Any) -> tuple[Any, ...]:
    """A prepared accelerator, model, optimiser and loader."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = mixture(gate, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(ROWS, batch_size=batch)
    return (accelerator, *accelerator.prepare(model, optimizer, loader))


def train(accelerator: Accelerator, model: Any, optimizer: Any, batches: Any, **routed: Any) -> None:
    """One pass over the batches, as accelerate's own guide writes it."""
    model.train()
    for ids in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids, **routed).loss)
            optimizer.step()
            optimizer.zero_grad()


def routed(gate: str) -> dict[str, Any]:
    """Task ids, where the gate needs them: one task for all samples."""
    return {"routing_task_ids": ["beta"]} if gate == "task" else {}


@pytest.mark.parametrize("gate", list(GATES))
def test_prepared_training_moves_experts_and_gate_and_nothing_else(gate: str) -> None:
    accelerator, model, optimizer, loader = ready(gate=gate)
    before = values(model)
    train(accelerator, model, optimizer, loader, **routed(gate))
    moved = {name for name, value in values(model).items() if not torch.equal(before[name], value)}
    assert {name for name in before if "lora_B" in name} <= moved
    assert all("molora_" in name for name in moved)
    assert any("molora_gate" in name for name in moved) == (gate != "task")


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    def gradients(accumulate: int, batch: int) -> dict[str, Tensor]:
        accelerator, model, _, loader = ready(
            accumulate, batch, aux_losses={"z": 0.5}
        )  # z: a mean over tokens
        model.train()
        for ids in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(1, 16)
    assert any(value.abs().max() > 1e-4 for name, value in whole.items() if "molora_gate" in name)
    for name, value in gradients(4, 4).items():
        assert torch.allclose(value, whole[name], atol=1e-6), name


@pytest.mark.parametrize("gate", list(GATES))
def test_a_state_saved_and_loaded_goes_on_bit_equal(tmp_path: Path, gate: str) -> None:
    noisy = {"lora_dropout": 0.2}
    set_seed(3)
    accelerator, model, optimizer, loader = ready(2, gate=gate, **noisy)
    train(accelerator, model, optimizer, loader, **routed(gate))
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, loader, **routed(gate))
    straight = values(model)

    set_seed(4)
    accelerator, model, optimizer, loader = ready(2, gate=gate, **noisy)
    accelerator.load_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, loader, **routed(gate))
    for name, value in values(model).items():
        assert torch.equal(value, straight[name]), name


@pytest.mark.parametrize("gate", list(GATES))
def test_an_unwrapped_model_saves_an_adapter_that_loads(tmp_path: Path, gate: str) -> None:
    accelerator, model, optimizer, loader = ready(gate=gate)
    train(accelerator, model, optimizer, loader, **routed(gate))
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapter", save_function=accelerator.save)
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    with torch.no_grad():
        logits = model.eval()(input_ids=ROWS, **routed(gate)).logits
        assert torch.equal(logits, again(input_ids=ROWS, **routed(gate)).logits)


def trained_mixture(gate: str) -> Any:
    """A mixture whose experts do something."""
    model = mixture(gate).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "molora_gate" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_adapter_on_a_base_that_is_offloaded_computes_the_same(
    tmp_path: Path, gate: str, offload: str
) -> None:
    model = trained_mixture(gate)
    model.save_pretrained(tmp_path / "adapter")
    settings = {"max_new_tokens": 4, "do_sample": False, **routed(gate)}
    with torch.no_grad():
        logits = model(input_ids=ROWS, **routed(gate)).logits
        text = model.generate(input_ids=ROWS[:2], **settings)
        for number, load in enumerate((PeftModel.from_pretrained, molora.load)):
            away = base()
            if offload == "cpu":
                cpu_offload(away, execution_device="cpu")
            else:
                disk_offload(away, str(tmp_path / f"off{number}"), execution_device="cpu")
            again = load(away, tmp_path / "adapter")
            assert all(p.is_meta != ("molora_" in name) for name, p in again.named_parameters())
            assert torch.equal(again(input_ids=ROWS, **routed(gate)).logits, logits)
            assert torch.equal(again.generate(input_ids=ROWS[:2], **settings), text)


def test_an_adapter_that_is_offloaded_itself_is_refused() -> None:
    model = trained_mixture("token")
    with torch.no_grad():
        model(input_ids=ROWS)
        cpu_offload(model, execution_device="cpu")
        with pytest.raises(molora.ConfigError, match="offload the base first"):
            model(input_ids=ROWS)

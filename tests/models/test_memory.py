"""Bytes counted on fake tensors are those that a real step takes, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import load_recipe
from molora.data.module import MoLoraDataModule
from molora.models.base import base_skeleton
from molora.models.build import build_model, build_skeleton, labels_of_tasks, tasks_of
from molora.models.memory import _ATTENTION, estimate, taken_off
from molora.training.forecast import first_encoded, memory_line
from molora.training.objective import Supervised
from tests.training.runs import recipe_for, write_base, write_encoder
from tests.training.test_train import classification

SEQUENCE = {"gate": {"kind": "sequence"}, "aux_losses": {"task_label": 1.0}}


@pytest.mark.parametrize("case", ["top-k", "many experts", "classifier", "bfloat16"])
def test_fake_bytes_are_real_bytes(tmp_path: Path, case: str) -> None:
    recipe = recipe_for(write_base(tmp_path / "base"), tmp_path)
    if case == "classifier":
        recipe = classification(write_encoder(tmp_path / "encoder"), tmp_path, tmp_path / "letters.jsonl")
    if case == "many experts":  # few of them at a time: grouped products
        recipe["adapter"] |= {"num_experts": 24, "r": 4}
    if case == "bfloat16":
        recipe["adapter"] |= SEQUENCE
        recipe["base"] = {"model": str(tmp_path / "base"), "dtype": "bfloat16"}
    config = load_recipe(recipe)
    tasks = tasks_of(config)
    labels = labels_of_tasks(config.base, tasks)
    model, tokenizer = build_model(config, tasks.ids, labels)
    batch = next(iter(MoLoraDataModule(config.data, tasks, tokenizer, 4).train_dataloader()))
    autocast = torch.bfloat16 if case == "bfloat16" else None

    def loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return Supervised(None).loss(model, batch)[0]

    found = estimate(
        build_skeleton(config, tasks.ids, labels), batch, loss,
        base_dtype=getattr(torch, config.base.dtype), autocast=autocast,
    )  # fmt: skip

    own = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    learns = [p for p in model.parameters() if p.requires_grad]
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.get_base_model().set_attn_implementation(_ATTENTION)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None),
    ):
        graph = loss(model.train(), dict(batch))
    assert found.kept == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    graph.backward()
    optimizer = torch.optim.AdamW(learns)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_")]
    assert found.learning == sum(t.nbytes for t in moments) + sum(
        p.grad.nbytes for p in learns if p.grad is not None
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_bytes_of_a_quantised_base_are_those_it_has(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = recipe_for(write_base(tmp_path / "base"), tmp_path)
    recipe["base"] = {"model": str(tmp_path / "base"), "quantization": quantization}
    config = load_recipe(recipe)
    tasks = tasks_of(config)
    model, tokenizer = build_model(config, tasks.ids)
    examples, _ = first_encoded(config, tasks, tokenizer)
    said = memory_line(config, build_skeleton(config, tasks.ids), None, examples, tokenizer)

    real = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        scales = getattr(parameter, "SCB", None)
        real += 0 if state is None else state.absmax.nbytes + state.code.nbytes
        real += 0 if scales is None else scales.nbytes
    bare = base_skeleton(config.base)
    whole = sum(tensor.nbytes for tensor in (*bare.parameters(), *bare.buffers()))
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert real == whole + adapter - taken_off(bare, quantization, torch.float32)
    assert f"weights {real / 1e6:.1f} MB" in said

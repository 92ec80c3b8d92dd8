"""Optimiser groups hold every trainable parameter once, at the right rate; schedules have their known shape."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from molora import GateConfig
from molora.config import StageConfig, TrainConfig
from molora.errors import ConfigError
from molora.gates.gate import Gate
from molora.training.optimizer import (
    SCHEDULES,
    build_optimizer,
    build_scheduler,
    lr_factor,
    parameter_groups,
    parameters_by_role,
    trained_parts,
    warmup_steps,
)
from tests.zoo import batch_for, molora_model


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(max_steps=10, **changes)


@pytest.mark.parametrize(
    ("architecture", "gate", "adapter"),
    [
        ("llama", "top2-group", {}),
        ("llama", "constant-linear", {"modules_to_save": ["lm_head"]}),
        ("llama", "task-group", {"frozen_experts": ["expert_0"]}),
        ("llama", "soft-group", {"target_modules": ["q_proj"], "plain_targets": ["v_proj"]}),
        ("bert", "soft-linear", {}),
    ],
)
def test_every_trainable_parameter_is_in_exactly_one_group(
    architecture: str, gate: str, adapter: dict[str, Any]
) -> None:
    model = molora_model(architecture, gate, **adapter)
    grouped = [id(p) for group in parameter_groups(model, settings()) for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


def test_groups_have_their_own_rates_and_decay() -> None:
    model = molora_model("bert", "soft-group")
    chosen = settings(lr=1e-3, gate_lr=1e-4, head_lr=1e-2, lora_plus_ratio=16.0, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(model, chosen)}
    rates = {name: group["lr"] for name, group in groups.items()}
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert rates == {"experts_A": 1e-3, "experts_B": pytest.approx(16e-3), "gates": 1e-4, "heads": 1e-2}
    assert decay == {"experts_A": 0.1, "experts_B": 0.1, "gates": 0.0, "heads": 0.1}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("lora_B" in names[id(p)] for p in groups["experts_B"]["params"])
    assert all("gate" in names[id(p)] for p in groups["gates"]["params"])
    assert all("classifier" in names[id(p)] for p in groups["heads"]["params"])


def test_ratio_one_is_plain_adamw() -> None:
    model = molora_model("llama")
    reference = copy.deepcopy(model)
    grouped = build_optimizer(model, settings(lr=1e-2))
    plain = torch.optim.AdamW(
        [p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    for trained, optimizer in ((model, grouped), (reference, plain)):
        for _ in range(3):
            trained(**batch_for("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    own, other = dict(model.named_parameters()), dict(reference.named_parameters())
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_nothing_to_train_is_refused() -> None:
    model = molora_model("llama").requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(model, settings())


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_warmup_rises_to_one_and_the_schedule_follows(schedule: str) -> None:
    factors = [lr_factor(step, schedule=schedule, warmup=4, total=20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(factors[4:]))
    assert all(0 < factor <= 1 for factor in factors)


def test_schedules_end_where_they_should() -> None:
    assert lr_factor(20, schedule="cosine", warmup=0, total=20) == pytest.approx(0.0)
    assert lr_factor(10, schedule="cosine", warmup=0, total=20) == pytest.approx(0.5)
    assert lr_factor(15, schedule="linear", warmup=0, total=20) == pytest.approx(0.25)
    assert lr_factor(10**6, schedule="constant", warmup=0, total=20) == 1.0


def test_warmup_counts_steps_or_a_fraction() -> None:
    assert warmup_steps(7, 100) == 7
    assert warmup_steps(0.05, 100) == 5
    assert warmup_steps(0.0, 100) == 0


def test_the_schedule_scales_all_groups_alike() -> None:
    model = molora_model("llama")
    optimizer = build_optimizer(model, settings(lr=1e-3, gate_lr=1e-4))
    scheduler = build_scheduler(optimizer, settings(schedule="linear", warmup=0), total=4)
    optimizer.step()
    scheduler.step()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "experts_A": pytest.approx(7.5e-4),
        "experts_B": pytest.approx(7.5e-4),
        "gates": pytest.approx(7.5e-5),
    }


def test_stages_follow_one_another_and_the_last_goes_on() -> None:
    stages = [
        StageConfig(steps=3, train=["experts"]),
        StageConfig(steps=2, train=["gates"]),
        StageConfig(train=["heads"]),
    ]
    seen = [sorted(trained_parts(stages, step)) for step in range(7)]
    assert seen == [["experts"]] * 3 + [["gates"]] * 2 + [["heads"]] * 2
    assert trained_parts([], 5) == {"experts", "gates", "heads"}


def test_everything_a_gate_holds_learns_at_the_gates_rate():
    gate = GateConfig(score="mlp", bias=True, select="threshold", threshold_learned=True, blend="sequence")
    model = molora_model("llama", gate)
    roles = parameters_by_role(model)
    assert not roles["heads"]
    held = [p for m in model.modules() if isinstance(m, Gate) for p in m.parameters()]
    assert {id(p) for p in roles["gates"]} == {id(p) for p in held}

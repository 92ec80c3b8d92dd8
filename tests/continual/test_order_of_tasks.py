"""`continual.order`: ids, experts and matrices follow it, whatever the order in `data.tasks`."""

from __future__ import annotations

import pytest

import molora
from molora.config import load_recipe
from molora.models.build import load_trained
from tests.continual.test_sequence import NAMES, matrix, recipe
from tests.zoo import beyond

# One for each way to hand tasks out: shared experts, one each under each kind of gate, old records again, all at once.
KINDS = ("sequential", "color", "o_lora", "o_lora under a learned gate", "gated", "replay", "joint")


# An expert for each, and tasks together.
FAST = ("color", "joint")


@pytest.mark.parametrize("kind", beyond(KINDS, *FAST))
def test_tasks_are_learned_in_their_order(kind, tmp_path):
    kind, _, learned = kind.partition(" ")
    order = [NAMES[2], NAMES[0]]
    whole = recipe(tmp_path)
    tasks = {name: whole["data"]["tasks"][name] for name in sorted(order)}
    assert list(tasks) != order
    whole |= {
        "data": {"max_length": 48, "tasks": tasks},
        "continual": {"strategy": kind, "order": order},
        "train": {"max_steps": 1, "batch_size": 8},
    }
    if learned:
        whole["adapter"] = {**whole["adapter"], "gate": "soft"}
    run = molora.train_sequence(whole)
    assert matrix(run)["matrices"]["shown"]["tasks"] == order
    model, _, config = load_trained(run.path)
    assert model.task_ids == {name: i for i, name in enumerate(order)}
    assert list(config.data.tasks) == order
    assert molora.evaluate(run, modes=["task"]).score(order[1], "task").count == 4


def test_a_section_without_settings_is_the_default_strategy(tmp_path):
    config = load_recipe(recipe(tmp_path, continual={}))
    assert (config.continual.strategy.kind, config.adapter.num_experts, config.adapter.gate.scope) == (
        "color",
        1,
        "task",
    )


def test_a_misspelt_strategy_is_the_only_problem(tmp_path):
    with pytest.raises(molora.ConfigError, match="Did you mean 'o_lora'") as found:
        load_recipe(recipe(tmp_path, continual={"strategy": "olora"}))
    assert "num_experts" not in str(found.value) and "leave the gate out" not in str(found.value)

"""The `federated` section: what is filled in, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from molora.config import load_recipe
from tests.config.recipes import refusal, small


def rounds(*, train: Any = None, adapter: Any = None, **federated: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {"train": train or {}, "federated": federated}
    if adapter is not None:
        sections["adapter"] = {"num_experts": 4, **adapter}
    return small(**sections)


def test_what_is_left_out_is_filled_in() -> None:
    settings = load_recipe(rounds(partition="dirichlet", clients=5, fraction=0.5)).federated
    assert settings is not None
    assert (settings.alpha, settings.asked, settings.aggregate) == (0.5, 3, "fedavg")
    assert load_recipe(load_recipe(rounds())).federated == load_recipe(rounds()).federated
    assert load_recipe(small()).federated is None


REFUSED = {
    "unknown key": (rounds(client=3), "federated.client", "Did you mean 'clients'?"),
    "unknown way": (rounds(aggregate="flor"), "federated.aggregate", "Did you mean 'flora'?"),
    "alpha of iid": (rounds(alpha=0.1), "federated.alpha", "acts only with partition: dirichlet"),
    "more than are asked": (rounds(clients=4, fraction=0.5, min_clients=3), "federated.min_clients", "only 2 clients are asked"),
    "steps of one training": (rounds(train={"max_steps": 9}), "train.max_steps", "a client trains federated.local_steps"),
    "epochs": (rounds(train={"epochs": 2}), "train.epochs", "a client trains federated.local_steps"),
    "validation": (rounds(train={"val_every": 2}), "train.val_every", "scored at its end"),
    "checkpoints": (rounds(train={"save_every": 2}), "train.save_every", "every round is saved"),
    "going back": (rounds(train={"on_nonfinite": "rollback"}), "train.on_nonfinite", "a client that diverges sends nothing"),
    "devices": (rounds(train={"devices": 2}), "train.devices", "clients train one after another"),
    "trackers": (rounds(train={"loggers": ["wandb"]}), "train.loggers", "allowed: csv"),
    "router": (rounds(adapter={"router": "gaussian"}), "adapter.router", "prompts, which stay with the clients"),
    "adalora": (rounds(adapter={"kind": "adalora"}), "adapter.kind", "use kind: lora"),
    "sparse": (rounds(adapter={"kind": "sparse"}), "adapter.kind", "draws its masks by what one training sees"),
    "ffa with an A that learns": (rounds(aggregate="ffa"), "adapter.kind", "aggregate: ffa needs kind: lora_fa."),
    "flora of a kind": (rounds(aggregate="flora", adapter={"kind": "vera"}), "adapter.kind", "flora needs kind: lora."),
    "flora with one A": (rounds(aggregate="flora", adapter={"share_A": True}), "adapter.share_A", "needs share_A: false."),
    "sequence": ({**rounds(), "continual": {"strategy": "sequential"}}, "federated", "write only one of continual and federated"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(case: str) -> None:
    recipe, where, words = REFUSED[case]
    found = refusal(recipe)
    assert any(where in line and words in line for line in found.splitlines()), found


def test_steps_that_were_written_are_not_answered_with_epochs_that_were_not() -> None:
    assert "epochs" not in refusal(rounds(train={"max_steps": 9}))

"""record_routing against counting by hand; padding and base-only tokens do not count."""

from __future__ import annotations

import pickle

import pytest
import torch

import molora
from molora.calls.call import CallCache
from molora.tuner.layer import MoLoraLayer
from tests.zoo import GATES, HARD, TASKS, batch_for, molora_model, routed


@pytest.mark.parametrize("gate", GATES)
def test_the_table_equals_counting_by_hand(gate):
    model, batch = molora_model("llama", gate), batch_for("llama", padding="right")
    mask, seen = batch["attention_mask"].bool().reshape(-1), {}
    for layer in model.modules():
        if isinstance(layer, MoLoraLayer) and "default" in layer.molora_gate:
            key = layer.mounts["default"].key
            layer.molora_gate["default"].register_forward_hook(
                lambda _m, _i, out, key=key: seen.setdefault(key, out)
            )
    with molora.record_routing(model) as record, torch.no_grad():
        model(**batch, **routed(gate))
    rows = record.table()
    assert record.tokens == mask.sum()
    assert {row["expert"] for row in rows} == {"expert_0", "expert_1", "expert_2"}
    for row in rows:
        if gate in HARD:  # the three rows hold 7, 6 and 5 tokens of one task each
            tokens = [7, 6, 5][int(row["expert"][-1])]
            assert row["share"] == row["mean_weight"] == row["top1_share"] == pytest.approx(tokens / 18)
            assert row["entropy"] == pytest.approx(0.0)
            continue
        routing, expert = seen[row["gate"]], int(row["expert"][-1])
        weights, probs, chosen = routing.weights, routing.probs, routing.selected
        assert routing.experts is None
        if len(weights) == 3:  # one row per sample of 7 tokens
            weights, probs, chosen = (t.repeat_interleave(7, dim=0) for t in (weights, probs, chosen))
        if len(weights) > 1:
            weights, probs, chosen = weights[mask], probs[mask], chosen[mask]
        assert row["mean_weight"] == pytest.approx(weights[:, expert].mean().item(), abs=1e-6)
        assert row["share"] == pytest.approx(chosen[:, expert].mean().item(), abs=1e-6)
        assert row["top1_share"] == pytest.approx((weights.argmax(-1) == expert).float().mean().item())
        assert row["entropy"] == pytest.approx(torch.special.entr(probs).sum(-1).mean().item(), abs=1e-5)
    gates = {"global": 1, "block": 2, "group": 8, "linear": 14}[GATES[gate].get("share", "group")]
    assert len({row["gate"] for row in rows}) == gates


def test_by_task_separates_tasks_and_leaves_base_only_out():
    model, batch = molora_model("llama", "task-group"), batch_for("llama")
    with molora.record_routing(model) as record:
        model(**batch, routing_task_ids=["alpha", None, "gamma"])
    assert record.by_task() == {
        "alpha": {"expert_0": 1.0, "expert_1": 0.0, "expert_2": 0.0},
        "gamma": {"expert_0": 0.0, "expert_1": 0.0, "expert_2": 1.0},
    }
    assert record.tokens == 14


def test_records_add_up_over_forwards_and_over_growth():
    model, batch = molora_model("llama", "soft-linear"), batch_for("llama")
    with molora.record_routing(model) as record:
        model(**batch)
        model.add_expert("late")
        model(**batch)
    assert record.tokens == 42
    rows = [row for row in record.table() if row["expert"] == "late"]
    assert len(rows) == 14 and all(0 < row["mean_weight"] < 0.5 for row in rows)


def test_nothing_is_recorded_outside_and_no_activation_stays():
    model, batch = molora_model("llama", "soft-group"), batch_for("llama")
    with molora.record_routing(model) as record:
        pass
    model(**batch, routing_task_ids=list(TASKS))
    assert record.table() == [] and record.tokens == 0
    context = next(m for m in model.modules() if isinstance(m, MoLoraLayer)).context
    assert context.here.call is None and context.call.cache == CallCache()


def test_a_constant_gate_counts_every_token():
    model = molora_model("llama", "constant-linear")
    with molora.record_routing(model) as record:
        model(input_ids=batch_for("llama")["input_ids"])
    assert record.tokens == 21


def test_ten_times_the_batches_keep_no_byte_more():
    model, batch = molora_model("llama", "top2-group"), batch_for("llama")
    kept = []
    with molora.record_routing(model) as record:
        for batches in (1, 9):
            for _ in range(batches):
                model(**batch)
            kept.append(len(pickle.dumps(record)))
    assert kept[0] == kept[1]
    assert record.tokens == 10 * int(batch["attention_mask"].sum())

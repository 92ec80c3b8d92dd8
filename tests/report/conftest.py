"""A report as an add-expert run leaves it."""

import pytest

from molora.evaluation.report import Report, Score
from molora.evaluation.routing import RoutingSummary


def gate_rows(layer, weights):
    return [
        {"gate": f"layers.{layer}.attn", "layer": layer, "expert": e, "share": w, "mean_weight": w,
         "top1_share": w, "entropy": 0.1}
        for e, w in weights.items()
    ]  # fmt: skip


@pytest.fixture
def report():
    modes = {"gate": 0.9, "task": 0.95, "base": 0.1}
    scores = [Score(t, m, "exact_match", v, 100) for t in ("reverse [x]", "sum") for m, v in modes.items()]
    scores.append(Score("prose", "gate", "loss", 1.5, 40))
    return Report(
        scores=scores,
        before=[Score("sum", "gate", "exact_match", 0.93, 100)],
        routing=RoutingSummary(
            "gate",
            999,
            {"reverse [x]": {"a": 0.9, "b": 0.1}, "sum": {"a": 0.2, "b": 0.8}},
            gate_rows(0, {"a": 0.98, "b": 0.02}) + gate_rows(1, {"a": 1.0, "b": 0.0}),
        ),
        facts={"old_tasks_bit_equal": True},
        notes=["a <note>"],
        environment={"torch": "2.13.0"},
    )

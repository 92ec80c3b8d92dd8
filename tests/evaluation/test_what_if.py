"""Experts changed: similarity against whole weight updates, scores with one expert alone or left out, and the sentences."""

from __future__ import annotations

import pytest
import torch

from molora import routing
from molora.data.clusters import inference
from molora.evaluation.counterfactual import AS_IT_IS, BASE, EVEN, Counterfactuals, counterfactuals
from molora.evaluation.findings import headline, warnings
from molora.evaluation.naming import Naming
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import RoutingSummary
from molora.evaluation.score import Limits
from molora.evaluation.similarity import Similarity, similarity
from molora.forward.mount import MountPoint
from tests.evaluation.test_runner import build, task, tokenizer_and_base  # noqa: F401
from tests.zoo import molora_model


def test_similarity_is_the_cosine_of_whole_updates_and_the_overlap_of_subspaces():
    model = molora_model("llama", num_experts=3)
    found = similarity(model)
    cosines, overlaps = [], []
    for point in (m for m in model.modules() if isinstance(m, MountPoint)):
        experts = [e._replace(A=e.A.double(), B=e.B.double()) for e in point.mounts["default"].bank.experts()]
        deltas = [e.delta().flatten() for e in experts]
        cosines.append(torch.cosine_similarity(deltas[0], deltas[2], dim=0))
        one, two = (torch.linalg.qr(experts[i].A.t())[0] for i in (0, 2))
        overlaps.append((one.t() @ two).square().sum() / min(one.shape[1], two.shape[1]))
    assert found.cosine["expert_0"]["expert_2"] == pytest.approx(float(torch.stack(cosines).mean()), abs=2e-5)
    assert found.overlap["expert_0"]["expert_2"] == pytest.approx(
        float(torch.stack(overlaps).mean()), abs=2e-5
    )
    assert found.cosine["expert_1"]["expert_1"] == pytest.approx(1.0)
    assert found.alike() == []


def test_a_copied_expert_is_found_to_be_the_same():
    model = molora_model("llama", num_experts=2)
    model.add_expert("twin", init="copy:expert_1")
    assert similarity(model).alike() == [("expert_1", "twin")]
    assert similarity(molora_model("llama", "soft-group", num_experts=1)) is None


def test_scores_under_every_change(tokenizer_and_base):  # noqa: F811
    tokenizer, model = tokenizer_and_base[0], build(tokenizer_and_base, gate="soft")
    tasks = [task("a", 0, "loss"), task("b", 1, "loss")]
    with inference(model):
        found = counterfactuals(model, tokenizer, tasks, mode="gate", limits=Limits(batch_size=2), records=3)
        few = [task("a", 0, "loss", list(tasks[0].eval[:3]))]
        from molora.evaluation.runner import evaluate_tasks

        expected = {
            mode: evaluate_tasks(model, tokenizer, few, modes=[mode]).score("a", mode).value
            for mode in ("gate", "base")
        }
        with routing(model, experts=["expert_1"]):
            alone = evaluate_tasks(model, tokenizer, few, modes=["gate"]).score("a", "gate").value
        with routing(model, without=["expert_0"]):
            without = evaluate_tasks(model, tokenizer, few, modes=["gate"]).score("a", "gate").value
        with routing(model, experts={"expert_0": 0.5, "expert_1": 0.5}):
            even = evaluate_tasks(model, tokenizer, few, modes=["gate"]).score("a", "gate").value
    changed = found.changed["a"]
    assert (changed[AS_IT_IS], changed[BASE]) == pytest.approx((expected["gate"], expected["base"]), rel=1e-5)
    assert (found.alone["a"]["expert_1"], changed[EVEN]) == pytest.approx((alone, even), rel=1e-5)
    assert found.without["a"]["expert_0"] == pytest.approx(without, rel=1e-5)
    assert set(found.without) == {"a", "b"} and set(found.without["a"]) == {"expert_0", "expert_1"}
    assert found.gain() is None, "losses have no points"


def rows(shares):
    """One gate's statistics from each expert's share."""
    return [
        {"gate": "g", "layer": 0, "expert": e, "share": s, "mean_weight": s, "top1_share": s, "entropy": 0.0}
        for e, s in shares.items()
    ]


def report(shares, **more):
    scores = [
        Score(t, m, "exact_match", v, 10) for t in ("x", "y") for m, v in (("gate", 0.75), ("base", 0.25))
    ]
    by_task = {t: dict(shares) for t in ("x", "y")}
    return Report(scores=scores, routing=RoutingSummary("gate", 9, by_task, rows(shares)), **more)


def test_a_sound_report_has_a_headline_and_no_warning():
    sound = report({"a": 0.5, "b": 0.5})
    assert headline(sound) == "75.0 % on average over 2 tasks (gate alone); the base alone 25.0 %."
    assert warnings(sound) == []


def test_a_planted_dead_expert_and_a_planted_collapse_are_named():
    (dead,) = warnings(report({"a": 0.5, "b": 0.49, "c": 0.01}))
    assert dead.startswith("Hardly used: c.") and "aux_losses.balance" in dead
    _, collapse = warnings(report({"a": 0.97, "b": 0.03}))
    assert "Collapse: in 1 of 1 gates" in collapse and "a in 1 of them" in collapse


def test_experts_that_do_the_same_and_a_gate_that_does_nothing_are_named():
    pairs = {"a": {"a": 1.0, "b": 0.99}, "b": {"a": 0.99, "b": 1.0}}
    changed = Counterfactuals(
        "gate", 5, {"x": "exact_match"}, {"x": {AS_IT_IS: 0.5, EVEN: 0.6, BASE: 0.1}}, {"x": {}}, {"x": {}}
    )
    found = warnings(
        report({"a": 0.5, "b": 0.5}, similarity=Similarity(pairs, pairs), counterfactuals=changed)
    )
    assert found[0].startswith("a and b do nearly the same") and "10.0 points better" in found[1]


def test_tasks_that_are_taken_for_each_other_are_named():
    named = {"x": {"x": 70, "y": 30}, "y": {"y": 90, "x": 10}, "z": {"z": 50, "x": 5}}
    (found,) = warnings(report({"a": 0.5, "b": 0.5}, naming=Naming(named)))
    assert found.startswith("The router takes 20 % of the prompts of x and y for the other one's.")
    assert "molora merge-experts" in found
    assert Naming(named).alike(above=0.0) == [("x", "y", 0.2), ("x", "z", 5 / 155)]


def test_tasks_whose_experts_do_each_other_s_work_are_named():
    alone = {
        "x": {"a": 0.80, "b": 0.79, "c": 0.5}, "y": {"a": 0.69, "b": 0.70, "c": 0.1},
        "z": {"a": 0.90, "b": 0.1, "c": 0.91},  # the expert of z does nothing for the others
        "w": {"a": 0.11, "b": 0.1, "c": 0.12},  # no expert has learned it
    }  # fmt: skip
    changed = Counterfactuals(
        "task", 5, dict.fromkeys(alone, "accuracy"), {t: {AS_IT_IS: 0.9, EVEN: 0.5, BASE: 0.11} for t in alone}, alone, {}
    )  # fmt: skip
    assert changed.one_skill() == [("x", "y", "a", "b")]
    assert changed.one_skill(within=0.005) == []
    (found,) = warnings(report({"a": 0.5, "b": 0.5}, counterfactuals=changed))
    assert found.startswith("x and y look like one skill: a and b each do both as well alone.")


def test_growth_is_told_in_the_headline():
    grown = report({"a": 0.5, "b": 0.5})
    grown.before = [Score("x", "gate", "exact_match", 0.8, 10)]
    assert headline(grown) == (
        "The 1 task from before went from 80.0 to 75.0 % on average (gate alone); the new task reaches 75.0 %."
    )
    grown.before.append(Score("y", "gate", "exact_match", 0.0, 10))  # what the new task had before
    grown.added = ["y"]
    assert headline(grown).startswith("The 1 task from before went from 80.0 to 75.0 %")
    grown.before = [Score("x", "task", "exact_match", 0.8, 10)]
    assert headline(grown).startswith("75.0 % on average over 2 tasks"), (
        "nothing to compare with in this mode"
    )
    assert headline(Report()) == "Nothing was scored: no task has held-out records."


def test_all_of_it_survives_json():
    pairs = {"a": {"a": 1.0, "b": 0.5}, "b": {"a": 0.5, "b": 1.0}}
    changed = Counterfactuals(
        "gate", 5, {"x": "loss"}, {"x": {AS_IT_IS: 0.5}}, {"x": {"a": 1.0}}, {"x": {"a": 2.0}}
    )
    whole = report({"a": 0.5, "b": 0.5}, similarity=Similarity(pairs, pairs), counterfactuals=changed)
    assert Report.from_json(whole.to_json()) == whole

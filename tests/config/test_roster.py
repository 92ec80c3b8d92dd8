"""The roster: what adding, removing and freezing experts makes of the table, and that a config keeps it as it is."""

from __future__ import annotations

import pytest

from molora import ConfigError, GateConfig, MoLoraConfig
from molora.config.mixture import ExpertSpec
from molora.config.roster import Roster, added, fitting, frozen, removed


def config(**settings) -> MoLoraConfig:
    return MoLoraConfig(
        **{"num_experts": 3, "expert_names": ["a", "b", "c"], "tasks": ["x", "y"], **settings}
    )


def roster(**settings) -> Roster:
    return config(**settings).roster


def blocks(table: Roster) -> list[list[str]]:
    again = config()
    table.write(again)
    return again.gate_blocks


def test_a_config_and_its_roster_say_the_same():
    spec = ExpertSpec(r=2, lora_alpha=4)
    made = config(
        frozen_experts=["a", "b"], free_rows=["a"], isolated_experts=["c"], expert_specs={"b": spec}, always_on={"c": 0.5},
        gate_blocks=[["a", "c"], ["b"]], tasks={"x": ["a"], "y": {"b": 0.7, "c": 0.3}}, task_ids={"x": 4, "y": 1},
        next_task_id=7, frozen_extras=True,
    )  # fmt: skip
    before, table = made.to_dict(), made.roster
    assert [(row.frozen, row.free_row, row.isolated, row.block) for row in table.experts] == [
        (True, True, False, 0),
        (True, False, False, 1),
        (False, False, True, 0),
    ]
    assert table.experts[1].spec == spec and table.tasks["y"].id == 1
    table.write(made)
    assert made.to_dict() == before


def test_an_added_expert_is_last_in_a_block_of_its_own_and_freezes_the_others():
    table = roster(free_rows=["a"], frozen_experts=["a"])
    grown = added(table, "late", learned=True, isolate=True)
    assert grown.names == ["a", "b", "c", "late"]
    assert [row.frozen for row in grown.experts] == [True, True, True, False]
    assert not any(row.free_row for row in grown.experts) and grown.frozen_extras
    assert blocks(grown) == [["a", "b", "c"], ["late"]]
    assert grown.experts[-1].isolated and blocks(added(grown, "later", learned=True))[-1] == ["later"]
    assert table.names == ["a", "b", "c"] and not table.frozen_extras  # the roster it came from is as it was
    free = added(table, "late", learned=True, freeze_others=False)
    assert [row.frozen for row in free.experts] == [True, False, False, False] and not free.frozen_extras


def test_a_new_task_has_every_expert_of_a_gate_that_learns_and_else_the_new_one():
    assert added(roster(), "d", ["z"], learned=True).tasks["z"].experts == ["a", "b", "c", "d"]
    assert added(roster(), "d", ["z"], learned=False).tasks["z"].experts == ["d"]
    several = added(roster(), "d", ["z", "w"], learned=True)
    assert (several.tasks["z"].id, several.tasks["w"].id, several.next_task_id) == (2, 3, 4)


def test_a_known_task_gains_the_expert_and_its_weights_keep_their_sum():
    table = roster(tasks={"x": {"a": 0.6, "b": 0.4}, "y": ["c"]})
    grown = added(table, "d", ["x", "y"], learned=False)
    assert grown.tasks["x"].experts == pytest.approx({"a": 0.4, "b": 0.8 / 3, "d": 1 / 3})
    assert grown.tasks["y"].experts == ["c", "d"] and grown.next_task_id == 2
    shrunk = removed(table, "a")
    assert shrunk.tasks["x"].experts == pytest.approx({"b": 1.0})


def test_a_removed_expert_leaves_its_block_and_its_tasks_and_ids_are_not_used_again():
    table = added(roster(tasks={"x": ["a"], "y": ["b", "c"]}), "d", ["z"], learned=False)
    with pytest.raises(ConfigError, match="'d' is the only expert of task 'z'"):
        removed(table, "d")
    shrunk = removed(table, "d", drop_tasks=True)
    assert list(shrunk.tasks) == ["x", "y"] and shrunk.next_task_id == 3
    assert added(shrunk, "e", ["w"], learned=False).tasks["w"].id == 3
    assert removed(shrunk, "b").tasks["y"].experts == ["c"]
    assert blocks(removed(table, "b")) == [["a", "c"], ["d"]]
    assert blocks(removed(removed(removed(table, "b"), "c", drop_tasks=True), "a", drop_tasks=True)) == [
        ["d"]
    ]


def test_freezing_parts_a_block_and_the_last_thawed_expert_thaws_the_rest():
    table = added(roster(free_rows=["a"], frozen_experts=["a"]), "d", learned=True, freeze_others=False)
    some = frozen(table, ["b", "d"])
    assert blocks(some) == [["a", "b"], ["c"], ["d"]]
    assert [row.frozen for row in some.experts] == [True, True, False, True]
    assert some.experts[0].free_row and not frozen(table, ["a"]).experts[0].free_row
    grown = added(roster(), "d", learned=True)
    thawed = frozen(grown, ["a"], state=False)
    assert thawed.frozen_extras and blocks(thawed) == [["b", "c"], ["a"], ["d"]]
    assert not frozen(thawed, ["b", "c"], state=False).frozen_extras


def test_a_task_is_frozen_with_all_of_its_experts_unless_their_rows_learn():
    tasks = {"x": ["a", "b"], "y": {"c": 1.0}}
    table = roster(tasks=tasks, frozen_experts=["a", "b"])
    assert table.task_frozen("x") and not table.task_frozen("y")
    assert not roster(tasks=tasks, frozen_experts=["a", "b"], free_rows=["b"]).task_frozen("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: added(t, "b", learned=True), "there is an expert 'b' already. Experts: a, b, c."),
        (lambda t: added(t, "../b", learned=True), "expert name"),
        (lambda t: added(t, "d", ["z", "z"], learned=True), "tasks names 'z' twice."),
        (lambda t: added(t, "d", ["no/name"], learned=True), "task name"),
        (lambda t: removed(t, "bb"), "no expert 'bb'. Did you mean 'b'"),
        (lambda t: removed(removed(removed(t, "a"), "b"), "c"), "'c' is the only expert left"),
        (lambda t: frozen(t, ["a", "nobody"]), "no expert 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError) as refusal:
        change(roster())
    assert message in str(refusal.value)


def test_a_gate_is_made_to_fit_so_many_experts():
    assert fitting(GateConfig(top_k=3, renorm="sum"), 2) == {"top_k": 2, "min_k": 1}
    assert fitting(GateConfig(top_k=2, renorm="sum"), 1)["renorm"] == "none"
    assert fitting(GateConfig(select="dense"), 1) == {"top_k": 1, "min_k": 1}
    assert fitting(GateConfig(top_k=[1, 3]), 2)["top_k"] == [1, 2]
    assert fitting(GateConfig(top_k={".": 3}), 2)["top_k"] == {".": 2}
    made = config(gate=GateConfig(select="top_p", min_k=3))
    gate = made.gate
    removed(made.roster, "a").write(made)
    assert made.gate is gate and gate.min_k == 2  # layers hold this gate's settings


def test_writing_takes_what_names_experts_along():
    made = config(always_on={"b": "rest", "a": 1.0})
    removed(made.roster, "b").write(made)
    assert made.num_experts == 2 and made.always_on == {"a": 1.0}

"""Tasks: ids that never depend on order, labels that are checked, kinds that fit the base."""

import json

import pytest

from molora.config import DataConfig
from molora.data.tasks import Task, TaskSet, assign_ids
from molora.errors import ConfigError, DataError


def recipe(*names, **task):
    task = {"source": "synthetic", "generator": "reverse", "train_size": 3, "eval_size": 2} | task
    return DataConfig(tasks=dict.fromkeys(names, task))


def test_new_tasks_get_ids_in_recipe_order():
    assert TaskSet.from_config(recipe("b", "a", "c")).ids == {"b": 0, "a": 1, "c": 2}


@pytest.mark.parametrize("names", [("b", "a", "c"), ("c", "b", "a"), ("a", "c", "b")])
def test_known_ids_are_kept_whatever_the_order(names):
    known = {"a": 5, "c": 0}
    tasks = TaskSet.from_config(recipe(*names), known)
    assert tasks.ids == {"a": 5, "c": 0, "b": 6}
    assert list(tasks.ids) == list(names)


def test_the_id_of_a_removed_task_is_never_given_again():
    first = TaskSet.from_config(recipe("a", "b"))
    second = TaskSet.from_config(recipe("a"), first.known_ids)
    assert second.ids == {"a": 0}
    third = TaskSet.from_config(recipe("c", "a"), second.known_ids)
    assert third.ids == {"c": 2, "a": 0}
    assert third.known_ids == {"a": 0, "b": 1, "c": 2}
    assert TaskSet.from_config(recipe("b"), third.known_ids).ids == {"b": 1}


def test_bad_names_and_ids_are_refused():
    with pytest.raises(ConfigError, match="not allowed"):
        assign_ids(["../up"], {})
    with pytest.raises(ConfigError, match="upper and lower case"):
        assign_ids(["Law"], {"law": 0})
    with pytest.raises(ConfigError, match="same id"):
        assign_ids(["c"], {"a": 1, "b": 1})
    for bad in (-1, True, "0"):
        with pytest.raises(ConfigError, match="not a task id"):
            assign_ids(["c"], {"a": bad})
    with pytest.raises(ConfigError, match=r"one kind of base.*'b' SEQ_2_SEQ_LM"):
        TaskSet.of(Task("a", 0, train=[]), Task("b", 1, train=[], kind="seq2seq"))
    with pytest.raises(ConfigError, match="same name"):
        TaskSet.of(Task("a", 0, train=[]), Task("a", 1, train=[]))
    with pytest.raises(ConfigError, match="same id"):
        TaskSet.of(Task("a", 0, train=[]), Task("b", 0, train=[]))


def test_a_set_finds_its_tasks_by_name():
    tasks = TaskSet.from_config(recipe("law", "news"))
    assert len(tasks) == 2 and [task.name for task in tasks] == ["law", "news"]
    assert tasks["news"].id == 1 and len(tasks["news"].train) == 3 and len(tasks["news"].eval) == 2
    with pytest.raises(ConfigError, match=r"unknown task 'new'.*Did you mean 'news'.*Known tasks: law, news"):
        tasks["new"]


def test_settings_reach_the_task(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "2+2", "a": 4}) + "\n")
    config = recipe("sums", source="jsonl", generator=None, train=str(path), train_size=None, eval_size=None,
                    prompt="{q}=", target="{a}", metric="loss", weight=2.0)  # fmt: skip
    task = TaskSet.from_config(config)["sums"]
    assert (task.prompt, task.target, task.metric, task.weight) == ("{q}=", "{a}", "loss", 2.0)
    assert (task.kind, task.task_type, task.eval) == ("causal_lm", "CAUSAL_LM", ())


def classification(tmp_path, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in ("B", "A", "B")))
    return DataConfig(tasks={"ab": {"source": "jsonl", "train": str(path), "kind": "classification", **more}})


def test_labels_come_from_the_recipe_or_from_what_the_data_declare(tmp_path):
    import datasets

    tasks = TaskSet.from_config(classification(tmp_path, labels=["B", "A"]))
    assert tasks["ab"].labels == ("B", "A") and tasks["ab"].metric == "accuracy" and tasks.num_labels == 2
    assert TaskSet.from_config(classification(tmp_path))["ab"].labels == ("A", "B")
    names = datasets.ClassLabel(names=["no", "yes", "maybe"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    table = datasets.Dataset.from_dict({"text": ["t"], "label": [2]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    config = DataConfig(
        tasks={"d": {"source": "folder", "path": str(tmp_path / "saved"), "kind": "classification"}}
    )
    assert TaskSet.from_config(config)["d"].labels == ("no", "yes", "maybe")


def test_a_task_checks_itself():
    with pytest.raises(ConfigError, match="unknown kind"):
        Task("a", 0, train=[], kind="regression")
    with pytest.raises(ConfigError, match="does not fit"):
        Task("a", 0, train=[], kind="seq2seq", task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="at least two labels"):
        Task("a", 0, train=[], kind="classification")
    with pytest.raises(ConfigError, match="not a plain field name"):
        Task("a", 0, train=[], prompt="{x.y}")


def test_a_faulty_source_is_met_when_records_are_needed():
    tasks = TaskSet.from_config(DataConfig(tasks={"a": {"source": "jsonl", "train": "nowhere.jsonl"}}))
    with pytest.raises(DataError, match="nowhere"):
        len(tasks["a"].train)

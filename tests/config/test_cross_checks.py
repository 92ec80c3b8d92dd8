"""Settings that are fine alone and wrong together: each refusal names the setting and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from molora.config import load_recipe
from tests.config.recipes import refusal, small

TWO = {
    "a": {"source": "synthetic", "generator": "copy"},
    "b": {"source": "synthetic", "generator": "reverse"},
}


def adapter(**settings: Any) -> dict[str, Any]:
    return small(adapter={"num_experts": 4, **settings}, data={"tasks": TWO})


def train(**settings: Any) -> dict[str, Any]:
    return small(train={"max_steps": 10, **settings})


def task(**settings: Any) -> dict[str, Any]:
    return small(data={"tasks": {"a": {"source": "synthetic", "generator": "copy", **settings}}})


GATE = {
    "top_k too large": ({"kind": "top_k", "top_k": 5}, "gate.top_k: 5 is more than num_experts = 4."),
    "renorm sum with one": ({"kind": "top_k", "top_k": 1, "renorm": "sum"}, "gate.renorm: 'sum' with top_k: 1 makes"),
    "renorm on dense": ({"select": "dense", "renorm": "sum"}, "gate.renorm: 'sum' does not act with select: dense"),
    "global tokens": ({"kind": "soft", "share": "global"}, "gate.share: 'global' cannot read each layer's own tokens"),
    "task gate that learns": ({"scope": "task"}, "gate.score: must be 'none' or 'table' or 'embedding' with scope: task."),
    "hard identity without task": (
        {"select": "hard", "transform": "identity"}, "gate.transform: identity with select: hard goes with scope: task"
    ),
    "score of another scope": ({"score": "table"}, "gate.score: must be 'linear' or 'mlp' or 'cosine' with scope: token."),
    "sum of raw scores": ({"transform": "identity", "renorm": "sum"}, "gate.renorm: 'sum' needs weights that are not negative"),
    "no regex": ({"share": "layers.("}, "gate.share: 'layers.(' is no regular expression"),
    "regex without a group": ({"share": "layers[.]"}, "gate.share: 'layers[.]' is not one of linear, group"),
    "share misspelt": ({"share": "blok"}, "gate.share: 'blok' is not one of linear, group, block"),
    "bias of a cosine": ({"score": "cosine", "bias": True}, "gate.bias: acts only with score: linear, mlp or embedding"),
    "logistic softmax": ({"noise": "logistic"}, "gate.noise: 'logistic' (a relaxed Bernoulli) goes with transform: sigmoid."),
    "threshold of another select": ({"threshold_learned": True}, "gate.threshold_learned: acts only with select: threshold."),
    "min_k too large": ({"kind": "top_p", "min_k": 5}, "gate.min_k: 5 is more than num_experts = 4."),
    "setting of another kind": ({"kind": "task", "temperature": 2.0}, "gate.temperature: not a setting of gate kind 'task'"),
    "long field beside kind": ({"kind": "soft", "scope": "task"}, "gate.scope: not a setting of gate kind 'soft'"),
}  # fmt: skip


@pytest.mark.parametrize("case", GATE)
def test_gates(case: str) -> None:
    gate, words = GATE[case]
    assert f"adapter.{words}" in refusal(adapter(gate=gate))


ADAPTER = {
    "task gate with balance": (
        {"gate": "task", "aux_losses": {"balance": 0.1}},
        "aux_losses.balance: needs a gate that learns; a task gate without a score has nothing to learn",
    ),
    "constant gate with z": (
        {"gate": "constant", "aux_losses": {"z": 0.1}},
        "aux_losses.z: is meaningless on a constant gate",
    ),
    "names and number": ({"expert_names": ["x"]}, "expert_names: names 1 experts, but num_experts = 4."),
    "names twice": ({"expert_names": ["x", "y", "X", "z"]}, "expert_names.2: 'X' is there twice"),
    "unknown expert": (
        {"tasks": {"a": ["expert_0"], "b": ["expert_9"]}},
        "tasks.b.0: unknown expert 'expert_9'. Did you mean 'expert_",
    ),
    "unknown expert in a map": ({"tasks": {"a": ["expert_0"], "b": {"x": 1.0}}}, "tasks.b.x: unknown expert 'x'."),
    "expert twice": ({"tasks": {"a": ["expert_0", "expert_0"], "b": ["expert_1"]}}, "tasks.a.1: 'expert_0' is there twice"),
    "no expert": ({"tasks": {"a": [], "b": ["expert_1"]}}, "tasks.a: names no expert"),
    "unknown task": (
        {"tasks": {"a": ["expert_0"], "b": ["expert_0"], "c": ["expert_1"]}},
        "tasks.c: no such task in data.tasks. Allowed: a, b.",
    ),
    "task left out": ({"tasks": {"a": ["expert_0"]}}, "tasks: says nothing about task 'b'"),
    "ranks twice": ({"r": {".": 4}, "rank_pattern": {"q_proj": 2}}, "rank_pattern: r already gives ranks"),
    "no rank": ({"r": []}, "r: is empty; give a rank"),
    "no targets": ({"target_modules": []}, "target_modules: is empty; name modules"),
    "empty target": ({"target_modules": [""]}, "target_modules: is empty; name modules"),
    "scaling twice": ({"use_rslora": True, "scaling": "alpha"}, "scaling: use_rslora: true already means"),
    "dropout of one": ({"lora_dropout": 1.0}, "lora_dropout: must be less than 1, not 1.0."),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTER)
def test_adapters(case: str) -> None:
    settings, words = ADAPTER[case]
    assert f"adapter.{words}" in refusal(adapter(**settings))


def test_a_task_gate_needs_an_expert_for_each_task() -> None:
    text = refusal(small(adapter={"num_experts": 1, "gate": "task"}, data={"tasks": TWO}))
    assert "adapter.num_experts: 2 tasks but 1 experts" in text


TRAIN = {
    "steps and epochs": ({"epochs": 2}, "epochs: max_steps is given too; write only one"),
    "16-true": ({"precision": "16-true"}, "Allowed: 32-true, bf16-mixed, 16-mixed."),
    "bf16-true": ({"precision": "bf16-true"}, "Allowed: 32-true, bf16-mixed, 16-mixed."),
    "unknown precision": ({"precision": "32"}, "precision: '32' is not allowed."),
    "warmup of everything": ({"warmup": 1.5}, "warmup: 1.5 is neither a fraction below 1 nor a whole number"),
    "patience without validation": ({"patience": 3}, "patience: counts validations, and val_every is not set"),
    "stage without steps": (
        {"stages": [{"train": ["experts"]}, {"train": ["gates"]}]},
        "stages.0: needs `steps`; only the last stage runs until the end.",
    ),
    "last stage with steps": ({"stages": [{"steps": 5, "train": ["experts"]}]}, "stages.0.steps: the last stage runs"),
    "stage after the end": (
        {"stages": [{"steps": 10, "train": ["experts"]}, {"train": ["gates"]}]},
        "stages: the last one would start at step 10 of max_steps = 10.",
    ),
    "part twice": ({"stages": [{"train": ["gates", "gates"]}]}, "stages.0.train: names a part twice."),
    "no part": ({"stages": [{"train": []}]}, "stages.0.train: must not be empty."),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAIN)
def test_training(case: str) -> None:
    settings, words = TRAIN[case]
    text = refusal(train(**settings))
    assert "train." in text
    assert words in text


TASK = {
    "foreign source key": ({"dataset": "x"}, "dataset: not a setting of source 'synthetic'. Its settings: generator."),
    "missing source key": ({"source": "jsonl", "generator": None}, "train: is missing: source 'jsonl' needs it."),
    "no files": ({"source": "jsonl", "generator": None, "train": []}, "train: is an empty list"),
    "foreign kind key": ({"labels": ["x", "y"]}, "labels: not a setting of kind 'causal_lm'."),
    "metric of another kind": ({"kind": "classification", "metric": "exact_match"}, "metric: 'exact_match' does not fit"),
    "labels twice": ({"kind": "classification", "labels": ["x", "x"]}, "labels: names a label twice."),
    "one label": ({"kind": "classification", "labels": ["x"]}, "labels: needs at least two labels."),
    "messages and prompt": ({"messages": "m", "prompt": "p"}, "prompt: is not read when `messages` gives"),
    "kind of another base": ({"kind": "seq2seq"}, "kind: 'seq2seq' does not fit base.task_type CAUSAL_LM."),
    "no weight": ({"weight": 0.0}, "weight: must be more than 0, not 0.0."),
}  # fmt: skip


@pytest.mark.parametrize("case", TASK)
def test_tasks(case: str) -> None:
    settings, words = TASK[case]
    assert f"data.tasks.a.{words}" in refusal(task(**settings))


def test_task_names_differ_in_more_than_case() -> None:
    text = refusal(small(data={"tasks": {"law": TWO["a"], "LAW": TWO["b"]}}))
    assert "data.tasks.LAW: differs from 'law' only in upper and lower case" in text


def test_no_tasks_are_refused() -> None:
    assert "data.tasks: must not be empty." in refusal(small(data={"tasks": {}}))


def test_one_problem_does_not_hide_another_in_its_section() -> None:
    text = refusal(small(adapter={"num_experts": 4, "ranks": 8, "gate": {"kind": "top_k", "top_k": 9}}))
    assert "adapter.ranks: not a setting." in text
    assert "adapter.gate.top_k: 9 is more than num_experts = 4." in text


def test_a_wrong_number_of_experts_is_one_problem() -> None:
    """What can only be judged beside num_experts is not complained about too."""
    text = refusal(small(adapter={"num_experts": 0, "gate": {"kind": "top_k", "top_k": 9}}))
    assert "adapter.num_experts: must be at least 1" in text
    assert "top_k" not in text


def test_kinds_follow_the_base() -> None:
    classifier = small(
        base={"model": "x", "task_type": "SEQ_CLS"}, data={"tasks": {"a": {"source": "hub", "dataset": "d"}}}
    )
    task_config = load_recipe(classifier).data.tasks["a"]
    assert (task_config.kind, task_config.metric, task_config.text) == (
        "classification",
        "accuracy",
        "{text}",
    )


def test_one_expert_alone_needs_no_gate_settings() -> None:
    assert load_recipe(small(adapter={"num_experts": 1})).adapter.gate.top_k == 1


def test_a_task_map_may_give_lists_and_weights() -> None:
    config = load_recipe(adapter(tasks={"a": ["expert_0", "expert_1"], "b": {"expert_2": 0.5}}))
    assert config.adapter.tasks == {"a": ["expert_0", "expert_1"], "b": {"expert_2": 0.5}}


def test_without_a_length_it_is_one_epoch() -> None:
    config = load_recipe(small(train={})).train
    assert (config.max_steps, config.epochs) == (None, 1)


def test_modes_that_give_no_answer_are_refused_before_training() -> None:
    only = {"eval": {"modes": ["gate"]}, "data": {"tasks": TWO}}
    text = refusal(small(adapter={"num_experts": 2, "gate": "task"}, **only))
    assert "eval.modes: 'gate' alone scores answers without a task id" in text
    assert load_recipe(small(adapter={"num_experts": 2, "gate": "task", "router": "gaussian"}, **only))
    assert load_recipe(small(adapter={"num_experts": 2}, **only))
    assert "eval.modes.1: 'task' is there twice." in refusal(small(eval={"modes": ["task", "task"]}))

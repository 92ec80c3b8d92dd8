"""Overrides: `a.b=value` changes one setting, and what is wrong with one names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molora.config import load_recipe
from molora.config.overrides import apply
from tests.config.recipes import SMALL, refusal, small


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("train.clip=null", "train.clip", None),
        ("train.clip=", "train.clip", None),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("adapter.target_modules=[q_proj, v_proj]", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("adapter.gate.top_k=1", "adapter.gate.top_k", 1),
        ("adapter.gate.share=linear", "adapter.gate.share", "linear"),
        ("base=other/model", "base.model", "other/model"),
        ("base.dtype=bfloat16", "base.dtype", "bfloat16"),
        ("eval.modes.0=task", "eval.modes.0", "task"),
        ("name=no", "name", "no"),
        ("output=a=b", "output", "a=b"),
    ],
)
def test_values(override: str, path: str, value: Any) -> None:
    changed: Any = load_recipe(small(eval={"modes": ["gate"]}), [override]).model_dump(mode="json")
    for part in path.split("."):
        changed = changed[int(part)] if part.isdecimal() else changed[part]
    assert changed == value
    assert type(changed) is type(value)


def test_a_shorthand_keeps_its_meaning_when_one_setting_is_added() -> None:
    config = load_recipe(
        small(adapter={"gate": "soft"}), ["adapter.gate.temperature=0.5", "base.revision=v1"]
    )
    assert (config.adapter.gate.select, config.adapter.gate.temperature) == ("dense", 0.5)
    assert (config.base.model, config.base.revision) == ("molora/tiny", "v1")


def test_every_shorthand_takes_a_setting() -> None:
    adapter = {"router": "gaussian", "gate": "sequence", "aux_losses": {"task_label": 0.5}}
    given = small(adapter=adapter) | {"train": {"max_steps": 1, "objective": "dpo"}}
    data, _ = apply(
        given,
        [
            "adapter.router.unknown=base",
            "adapter.aux_losses.task_label.mask=response",
            "train.objective.beta=0.2",
        ],
    )
    assert data["adapter"]["router"] == {"kind": "gaussian", "unknown": "base"}
    assert data["adapter"]["aux_losses"] == {"task_label": {"coefficient": 0.5, "mask": "response"}}
    assert data["train"]["objective"] == {"kind": "dpo", "beta": 0.2}
    config = load_recipe(small(adapter=adapter), ["adapter.router.unknown=base"])
    assert config.adapter.router is not None and config.adapter.router.unknown == "base"


def test_later_overrides_win() -> None:
    assert load_recipe(small(), ["seed=1", "seed=2"]).seed == 2


def test_a_task_may_be_added_and_its_name_may_have_dots() -> None:
    tasks = {"v1.2": {"source": "synthetic", "generator": "copy"}}
    overrides = ["data.tasks.v1.2.train_size=5", "data.tasks.new={source: synthetic, generator: reverse}"]
    config = load_recipe(small(data={"tasks": tasks}), overrides)
    assert config.data.tasks["v1.2"].train_size == 5
    assert config.data.tasks["new"].generator == "reverse"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "override 'train.lrr=1'  train.lrr: not a setting. Did you mean 'lr'?"),
        ("trian.lr=1", "override 'trian.lr=1'  trian: not a setting. Did you mean 'train'?"),
        ("train.lr=fast", "override 'train.lr=fast'  train.lr: must be a number, not 'fast'."),
        ("train.precision=16-true", "override 'train.precision=16-true'  train.precision: '16-true' would keep"),
        ("adapter.gate.top_k=9", "override 'adapter.gate.top_k=9'  adapter.gate.top_k: 9 is more than"),
        ("adapter.tasks.copy=[expert_9]", "override 'adapter.tasks.copy=[expert_9]'  adapter.tasks.copy.0: unknown"),
        ("train.lr", "override 'train.lr': write it as section.key=value"),
        ("=3", "override '=3': write it as section.key=value"),
        ("train..lr=3", "override 'train..lr=3': write it as section.key=value"),
        ("train.lr=[1, 2", "override 'train.lr=[1, 2':1  not valid YAML"),
        ("train.lr=!!python/name:os.system", "is not allowed"),
        ("seed.x=3", "override: seed is 0, which has no settings of its own."),
        ("eval.modes.5=task", "override '5': the list has items 0 to 0."),
    ],
)  # fmt: skip
def test_refusals(override: str, words: str) -> None:
    assert words in refusal(small(seed=0, eval={"modes": ["gate"]}), override)


def test_every_malformed_override_is_named() -> None:
    text = refusal(small(), "one", "two", "train.lr=1e-3")
    assert "override 'one'" in text
    assert "override 'two'" in text
    assert "train.lr" not in text.replace("such as train.lr=3e-4", "")


def test_problems_of_file_and_overrides_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("max_steps: 10", "max_step: 10"), encoding="utf-8")
    text = refusal(path, "seed=-1")
    assert f"{path}:10  train.max_step: not a setting. Did you mean 'max_steps'?" in text
    assert "override 'seed=-1'  seed: must be at least 0, not -1." in text

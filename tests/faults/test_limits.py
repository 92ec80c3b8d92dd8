"""Class 7 and 10: settings that ask for more memory or time than there is are refused before anything is made."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

from molora import MoLoraConfig
from molora.config import load_recipe
from molora.config.patterns import pattern_problem
from molora.errors import ConfigError
from molora.tuner.room import free_memory
from tests.config.recipes import small
from tests.zoo import base_model

HUGE = {
    "experts": ({"adapter": {"num_experts": 999_999_999}}, "adapter.num_experts: must be at most 16,384"),
    "experts by block": ({"adapter": {"num_experts": [999_999_999]}}, "adapter.num_experts.0: must be at most"),
    "rank": ({"adapter": {"r": 10**12}}, "adapter.r: must be at most 65,536"),
    "rank by pattern": ({"adapter": {"rank_pattern": {"q": 10**12}}}, "adapter.rank_pattern.q: must be at most 65,536"),
    "hidden layer": (
        {"adapter": {"gate": {"score": "mlp", "hidden": 10**9}}}, "adapter.gate.hidden: must be at most 65,536"
    ),
    "centres": (
        {"adapter": {"router": {"kind": "prototypes", "clusters": 10**9}}}, "clusters: must be at most 16,384"
    ),
    "made-up records": (
        {"data": {"tasks": {"a": {"source": "synthetic", "generator": "copy", "train_size": 10**9}}}},
        "data.tasks.a.train_size: must be at most 1,000,000",
    ),
    "beams": ({"eval": {"num_beams": 10**9}}, "eval.num_beams: must be at most 16,384"),
    "workers": (
        {"data": {"workers": 10**6, "tasks": {"a": {"source": "synthetic", "generator": "copy"}}}},
        "data.workers: must be at most 512",
    ),
    "steps beyond any number": ({"train": {"max_steps": 10**30}}, "train.max_steps: must be at most 1,000,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("case", HUGE)
def test_numbers_have_upper_bounds(case: str) -> None:
    settings, words = HUGE[case]
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_recipe(small(**settings))
    assert words in str(caught.value)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 999_999_999}, "num_experts=999999999: must be at least 1 and at most 16,384"),
        ({"r": 10**9}, "r=1000000000: must be at least 1 and at most 65,536"),
        (
            {"gate": {"score": "mlp", "hidden": 10**9}},
            "hidden=1000000000: must be at least 1 and at most 65,536",
        ),
    ],
)
def test_python_has_the_same_bounds(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        MoLoraConfig(**settings)


FOR_EVER = [
    r"(a+)+$",
    r"(a|a)*b",
    r"(.*)*x",
    r"(a?){30}a{30}",
    r"(?:\w+\.?)+!",
    ".*" * 4 + "x",
    ".*a" * 9,
    ".*..*..*..*..*Z",
    "(?:.|.e|..)" * 25 + "Z",
    "(?:.*.*.*.*.*Z)?x",
    "(?!.*.*.*.*.*Z).*",
    "(?=.*.*.*.*.*Z).*",
    r"\w*[a-z]\w*[a-z]\w*[a-z]\w*!",
]


@pytest.mark.parametrize("pattern", FOR_EVER)
def test_expressions_that_backtrack_for_ever_are_refused(pattern: str) -> None:
    for settings in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"rank_pattern": {pattern: 4}},
        {"num_experts": {pattern: 2, ".": 4}},
    ):
        with pytest.raises(ConfigError, match="could take for ever to match"):
            load_recipe(small(adapter={"num_experts": 4, **settings}))
        with pytest.raises(ConfigError, match="could take for ever to match"):
            MoLoraConfig(
                num_experts=settings.get("num_experts", 4),
                **{k: v for k, v in settings.items() if k != "num_experts"},
            )
    with pytest.raises(ConfigError, match="could take for ever to match"):
        load_recipe(small(adapter={"gate": {"share": f"({pattern})"}}))


ORDINARY = [
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj",
    r"^(?!.*vision).*layers.*\.(q_proj|k_proj|v_proj)$",
    r"(?:.*\.)?query",
    r"(.*layers\.\d+)\..*",
    r"layers\.([0-9]|1[0-5])\..*",
    "|".join(f".*{name}" for name in ("q", "k", "v", "o", "gate", "up", "down", "in", "out")),
    "|".join(rf"model\.layers\.\d+\..*{name}" for name in ("q", "k", "v", "o", "gate", "up")),
    r"(?:model\.)?(?:language_model\.)?(?:base_model\.)?(?:model\.)?layers\.\d+\.q_proj",
    r"^(language_model|model)(?!.*(lm_head|output|emb)).*",
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_expressions_are_kept(pattern: str) -> None:
    assert pattern_problem(pattern) is None


def test_what_is_kept_ends_in_time() -> None:
    """The longest chains allowed, on names longer than a model's, with no match to be found."""
    name = "model.layers.11.self_attn.q_proj" * 4
    for pattern in [".*" * 3 + "!", r"\w+\.?" + ".*!", ".*l.*a.*y.*e.*!"]:
        assert pattern_problem(pattern) is None
        began = time.perf_counter()
        assert re.fullmatch(pattern, name) is None
        assert time.perf_counter() - began < 5, pattern


def test_experts_that_do_not_fit_are_refused_before_they_are_made() -> None:
    base = base_model("llama")
    wide = max(module.in_features for module in base.modules() if isinstance(module, nn.Linear))
    assert wide * 2**14 * 2**16 * 4 > (free_memory() or 0)
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=r"16384 experts on .* need [\d,]+ bytes, [\d,]+ are free"):
        get_peft_model(base, MoLoraConfig(num_experts=2**14, r=2**16, target_modules="all-linear"))
    assert time.perf_counter() - began < 10


def test_lists_hold_names_not_expressions() -> None:
    assert load_recipe(small(adapter={"target_modules": ["(a+)+"]})).adapter.target_modules == ["(a+)+"]

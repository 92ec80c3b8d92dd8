"""The synthetic generators: exact answers, determinism, disjoint splits, demo tasks apart from general skills."""

from __future__ import annotations

import random

import pytest

from molora.data.synthetic import GENERATORS, generate, split_of
from molora.data.synthetic_sampling import Generator
from molora.errors import ConfigError, DataError

KNOWN = {
    "reverse": (("hello",), "olleh"),
    "swapcase": (("hElLo",), "HeLlO"),
    "unique": (("banana",), "ban"),
    "next": (("hazy",), "ibaz"),
    "index": (("az",), "1 26"),
    "consonants": (("aei",), "none"),
    "odd": (("abcde",), "ace"),
    "count": (("banana", "a"), "3"),
    "letter": (("hello", "2"), "e"),
    "find": (("hello", "l"), "3"),
    "last": (("hello", "2"), "lo"),
    "zip": (("abc", "xyz"), "axbycz"),
    "pick": (("red big cat", "2"), "big"),
    "lookup": (("a3 b7", "b"), "7"),
    "subtract": (("52", "17"), "35"),
    "larger": (("9", "10"), "10"),
    "series": (("2", "5", "8"), "11"),
    "increase": (("198",), "209"),
    "nested": (("upper", "reverse", "abc"), "CBA"),
    "pig": (("hello",), "ellohay"),
    "mirror": (("abc",), "abccba"),
    "mask": (("hello",), "hxllx"),
    "loud": (("hello",), "hEllO"),
    "spell": (("cat",), "c-a-t"),
    "stutter": (("cat",), "cCaAtT"),
    "back": (("ibma",), "halz"),
    "shout": (("hello",), "HELLO!"),
    "zigzag": (("hello",), "hElLo"),
    "pairs": (("abcde",), "badce"),
    "even": (("abcde",), "bd"),
    "boxed": (("cat",), "[tac]"),
    "title": (("red cat",), "Red Cat"),
    "initials": (("red big cat",), "rbc"),
    "turn": (("red big cat",), "cat big red"),
    "decrease": (("310",), "209"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_answers_are_exact(name: str) -> None:
    arguments, answer = KNOWN[name]
    assert GENERATORS[name].solve(*arguments) == answer


@pytest.mark.parametrize("name", GENERATORS)
def test_items_are_deterministic_distinct_and_split(name: str) -> None:
    train = generate(name, 300, seed=1, split="train")
    held_out = generate(name, 60, seed=2, split="eval")
    assert generate(name, 100, seed=1, split="train") == train[:100]
    assert generate(name, 100, seed=3, split="train") != train[:100]
    prompts = {item["prompt"] for item in train}
    assert len(prompts) == 300
    assert prompts.isdisjoint(item["prompt"] for item in held_out)
    assert all(item["target"] and len(item["prompt"] + item["target"]) < 60 for item in train + held_out)
    assert {split_of(item["prompt"]) for item in held_out} == {"eval"}


def test_there_are_enough_kinds() -> None:
    assert sum(generator.general for generator in GENERATORS.values()) >= 18
    assert sum(not generator.general for generator in GENERATORS.values()) >= 8


def test_no_demo_task_is_a_general_skill() -> None:
    """No general skill gives a demo task's answers: neither the name nor the function was in pre-training."""
    rng = random.Random(0)
    general = [generator for generator in GENERATORS.values() if generator.general]
    for demo in (generator for generator in GENERATORS.values() if not generator.general):
        samples = [demo.sample(rng) for _ in range(50)]
        for skill in general:
            assert demo.name != skill.name
            if len(skill.sample(rng)) == len(samples[0]):
                same = sum(_answer(skill, arguments) == demo.solve(*arguments) for arguments in samples)
                assert same <= 20, f"{skill.name} answers {demo.name}"


def _answer(skill: Generator, arguments: tuple[str, ...]) -> str | None:
    try:
        return skill.solve(*arguments)
    except ValueError:  # a skill on digits, asked about letters, or the reverse
        return None


def test_unknown_names_and_exhausted_generators_are_errors() -> None:
    with pytest.raises(ConfigError, match="reverze"):
        generate("reverze", 1)
    with pytest.raises(ConfigError, match="split"):
        generate("reverse", 1, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="distinct"):
        generate("series", 5000, 0, "eval")

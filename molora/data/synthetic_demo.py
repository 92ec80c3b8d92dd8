"""The demo tasks: synthetic generators held out from the embedded base's pre-training."""

from __future__ import annotations

import random
from collections.abc import Callable

from molora.data.synthetic_sampling import (
    VOWELS,
    Generator,
    Sampler,
    Solver,
    digits,
    one_word,
    phrase,
    shift_letters,
    spoken,
)


def _phrase(rng: random.Random) -> tuple[str, ...]:
    return (phrase(rng, 2, 4),)


def _digits(rng: random.Random) -> tuple[str, ...]:
    return (digits(rng, 3, 6),)


def _zigzag(text: str) -> str:
    return "".join(c.upper() if i % 2 else c for i, c in enumerate(text))


def _stutter(text: str) -> str:
    return "".join(c + c.upper() for c in text)


def _swap_pairs(text: str) -> str:
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def _on_vowels(text: str, change: Callable[[str], str]) -> str:
    return "".join(change(c) if c in VOWELS else c for c in text)


def _decrease(number: str) -> str:
    return "".join(str((int(c) - 1) % 10) for c in number)


def _demo(name: str, description: str, sample: Sampler, solve: Solver) -> Generator:
    return Generator(name, description, sample, solve, general=False)


DEMO: tuple[Generator, ...] = (
    _demo("pig", "first letter moved to the end, then ay", one_word(), lambda w: w[1:] + w[0] + "ay"),
    _demo("mirror", "the word, then the word backwards", one_word(3, 5), lambda w: w + w[::-1]),
    _demo("mask", "every vowel replaced by x", spoken, lambda w: _on_vowels(w, lambda c: "x")),
    _demo("loud", "every vowel made capital", spoken, lambda w: _on_vowels(w, str.upper)),
    _demo("spell", "the letters with dashes between", one_word(3, 7), "-".join),
    _demo("stutter", "every letter small, then capital", one_word(3, 6), _stutter),
    _demo("back", "every letter replaced by the one before it", one_word(), lambda w: shift_letters(w, -1)),
    _demo("shout", "capitals and an exclamation mark", one_word(), lambda w: w.upper() + "!"),
    _demo("zigzag", "every second letter made capital", one_word(), _zigzag),
    _demo("pairs", "neighbouring letters exchanged", one_word(), _swap_pairs),
    _demo("even", "the letters at even places", one_word(), lambda w: w[1::2]),
    _demo("boxed", "the word backwards, in brackets", one_word(3, 7), lambda w: f"[{w[::-1]}]"),
    _demo("title", "every word of a phrase with a capital", _phrase, str.title),
    _demo("initials", "the first letter of every word", _phrase, lambda p: "".join(w[0] for w in p.split())),
    _demo("turn", "the words of a phrase in reverse order", _phrase, lambda p: " ".join(p.split()[::-1])),
    _demo("decrease", "every digit one down, 0 to 9", _digits, _decrease),
)

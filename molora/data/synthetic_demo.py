"""The demo tasks: synthetic generators held out from the embedded base's pre-training."""

from __future__ import annotations

from molora.data.synthetic_sampling import (
    VOWELS,
    Generator,
    Sampler,
    Solver,
    digits,
    one_word,
    phrase,
    shift_digits,
    shift_letters,
    spoken,
)


def _zigzag(text: str) -> str:
    return "".join(c.upper() if i % 2 else c for i, c in enumerate(text))


def _swap_pairs(text: str) -> str:
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def _mask(text: str) -> str:
    return "".join("x" if c in VOWELS else c for c in text)


def _loud(text: str) -> str:
    return "".join(c.upper() if c in VOWELS else c for c in text)


def _demo(name: str, description: str, draw: Sampler, solve: Solver) -> Generator:
    return Generator(name, description, draw, solve, general=False)


DEMO: tuple[Generator, ...] = (
    _demo("pig", "first letter moved to the end, then ay", one_word(), lambda w: w[1:] + w[0] + "ay"),
    _demo("mirror", "the word, then the word backwards", one_word(3, 5), lambda w: w + w[::-1]),
    _demo("mask", "every vowel replaced by x", spoken, _mask),
    _demo("loud", "every vowel made capital", spoken, _loud),
    _demo("spell", "the letters with dashes between", one_word(3, 7), "-".join),
    _demo(
        "stutter",
        "every letter small, then capital",
        one_word(3, 6),
        lambda w: "".join(c + c.upper() for c in w),
    ),
    _demo("back", "every letter replaced by the one before it", one_word(), lambda w: shift_letters(w, -1)),
    _demo("shout", "capitals and an exclamation mark", one_word(), lambda w: w.upper() + "!"),
    _demo("zigzag", "every second letter made capital", one_word(), _zigzag),
    _demo("pairs", "neighbouring letters exchanged", one_word(), _swap_pairs),
    _demo("even", "the letters at even places", one_word(), lambda w: w[1::2]),
    _demo("boxed", "the word backwards, in brackets", one_word(3, 7), lambda w: f"[{w[::-1]}]"),
    _demo("title", "every word of a phrase with a capital", phrase, str.title),
    _demo("initials", "the first letter of every word", phrase, lambda p: "".join(w[0] for w in p.split())),
    _demo("turn", "the words of a phrase in reverse order", phrase, lambda p: " ".join(p.split()[::-1])),
    _demo("decrease", "every digit one down, 0 to 9", digits, lambda n: shift_digits(n, -1)),
)

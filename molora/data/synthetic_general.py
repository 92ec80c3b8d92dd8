"""The general skills: the synthetic generators the embedded base was pre-trained on."""

from __future__ import annotations

import random

from molora.data.synthetic_sampling import (
    LETTERS,
    VOWELS,
    Generator,
    Sampler,
    Solver,
    digits,
    few_letters,
    number,
    one_word,
    phrase,
    shift_digits,
    shift_letters,
    word,
)


def _mixed_case(rng: random.Random) -> str:
    return "".join(c.upper() if rng.random() < 0.5 else c for c in word(rng))


def _repeating(rng: random.Random) -> str:
    return few_letters(rng) if rng.random() < 0.7 else word(rng)


def _word_and_letter(rng: random.Random) -> tuple[str, ...]:
    text = few_letters(rng)
    return text, rng.choice(text if rng.random() < 0.9 else LETTERS)


def _word_and_own_letter(rng: random.Random) -> tuple[str, ...]:
    text = word(rng)
    return text, rng.choice(text)


def _word_and_two_letters(rng: random.Random) -> tuple[str, ...]:
    text, old = _word_and_letter(rng)
    return text, old, rng.choice(LETTERS)


def _word_and_place(rng: random.Random) -> tuple[str, ...]:
    text = word(rng)
    return text, str(rng.randint(1, len(text)))


def _two_words(rng: random.Random) -> tuple[str, ...]:
    return word(rng, 2, 6), word(rng, 2, 6)


def _equal_lengths(rng: random.Random) -> tuple[str, ...]:
    length = rng.randint(2, 4)
    return word(rng, length, length), word(rng, length, length)


def _maybe_same(rng: random.Random) -> tuple[str, ...]:
    text = word(rng, 3, 6)
    other = text
    if rng.random() < 0.5:
        place = rng.randrange(len(text))
        other = text[:place] + rng.choice(LETTERS) + text[place + 1 :]
    return text, other


def _two_numbers(rng: random.Random) -> tuple[str, ...]:
    return str(number(rng)), str(number(rng))


def _larger_first(rng: random.Random) -> tuple[str, ...]:
    small, large = sorted((number(rng), number(rng)))
    return str(large), str(small)


def _progression(rng: random.Random) -> tuple[str, ...]:
    start, step = number(rng), rng.randint(1, 20)
    return tuple(str(start + i * step) for i in range(3))


def _phrase_and_place(rng: random.Random) -> tuple[str, ...]:
    text = phrase(rng)
    return text, str(rng.randint(1, text.count(" ") + 1))


def _table_and_key(rng: random.Random) -> tuple[str, ...]:
    keys = rng.sample(LETTERS, rng.randint(2, 5))
    return " ".join(key + rng.choice("0123456789") for key in keys), rng.choice(keys)


def _zip(first: str, second: str) -> str:
    return "".join(a + b for a, b in zip(first, second, strict=True))


def _places(text: str) -> str:
    return " ".join(str(LETTERS.index(c) + 1) for c in text)


def _vowels(text: str) -> str:
    return "".join(c for c in text if c in VOWELS) or "none"


def _without(text: str, letter: str) -> str:
    return text.replace(letter, "") or "none"


def _next_number(a: str, b: str, c: str) -> str:
    return str(int(c) + int(b) - int(a))


_OUTER = {
    "upper": str.upper,
    "next": lambda text: shift_letters(text, 1),
    "double": lambda text: "".join(c + c for c in text),
}
_INNER = {
    "reverse": lambda text: text[::-1],
    "rotate": lambda text: text[1:] + text[:1],
    "consonants": lambda text: "".join(c for c in text if c not in VOWELS) or "none",
    "unique": lambda text: "".join(dict.fromkeys(text)),
    "swapends": lambda text: text[-1] + text[1:-1] + text[0],
}


def _nested(rng: random.Random) -> tuple[str, ...]:
    return rng.choice(list(_OUTER)), rng.choice(list(_INNER)), word(rng, 3, 6)


def _general(name: str, description: str, draw: Sampler, solve: Solver) -> Generator:
    return Generator(name, description, draw, solve, general=True)


GENERAL: tuple[Generator, ...] = (
    _general("copy", "the word itself", one_word(3, 10), lambda w: w),
    _general("reverse", "the word backwards", one_word(3, 8), _INNER["reverse"]),
    _general("upper", "the word in capitals", one_word(), str.upper),
    _general("lower", "a word in capitals made small", lambda rng: word(rng).upper(), str.lower),
    _general("swapcase", "small letters made capital and the reverse", _mixed_case, str.swapcase),
    _general("capital", "the first letter made capital", one_word(), str.capitalize),
    _general("sort", "the letters in alphabetical order", one_word(3, 6), lambda w: "".join(sorted(w))),
    _general("unique", "each letter once, at its first place", _repeating, _INNER["unique"]),
    _general("double", "every letter twice", one_word(3, 6), _OUTER["double"]),
    _general("next", "every letter replaced by the next of the alphabet", one_word(), _OUTER["next"]),
    _general("index", "the place of every letter in the alphabet", one_word(2, 4), _places),
    _general("rotate", "the first letter moved to the end", one_word(), _INNER["rotate"]),
    _general("swapends", "first and last letter exchanged", one_word(), _INNER["swapends"]),
    _general("consonants", "the word without its vowels, or none", one_word(), _INNER["consonants"]),
    _general("vowels", "only the vowels, or none", one_word(), _vowels),
    _general("odd", "the letters at odd places", one_word(), lambda w: w[::2]),
    _general("length", "the number of letters", one_word(3, 12), lambda w: str(len(w))),
    _general("count", "how often a letter occurs", _word_and_letter, lambda w, c: str(w.count(c))),
    _general("letter", "the letter at a place", _word_and_place, lambda w, i: w[int(i) - 1]),
    _general("find", "the first place of a letter", _word_and_own_letter, lambda w, c: str(w.index(c) + 1)),
    _general("first", "the first letters", _word_and_place, lambda w, i: w[: int(i)]),
    _general("last", "the last letters", _word_and_place, lambda w, i: w[-int(i) :]),
    _general("replace", "a letter replaced by another", _word_and_two_letters, str.replace),
    _general("remove", "a word without one letter, or none", _word_and_letter, _without),
    _general(
        "repeat",
        "a word several times",
        lambda rng: (word(rng, 2, 4), str(rng.randint(2, 4))),
        lambda w, i: w * int(i),
    ),
    _general("join", "two words as one", _two_words, lambda a, b: a + b),
    _general("zip", "two words, letter by letter in turn", _equal_lengths, _zip),
    _general("equal", "whether two words are the same", _maybe_same, lambda a, b: "yes" if a == b else "no"),
    _general("earlier", "the word that comes first in the alphabet", _two_words, min),
    _general("spaced", "the letters with spaces between", one_word(3, 7), " ".join),
    _general("quote", "the word in quotation marks", one_word(), lambda w: f'"{w}"'),
    _general("pick", "one word of a phrase", _phrase_and_place, lambda p, i: p.split()[int(i) - 1]),
    _general("words", "the number of words", phrase, lambda p: str(len(p.split()))),
    _general("lookup", "the digit that belongs to a letter", _table_and_key, lambda t, k: t[t.index(k) + 1]),
    _general("add", "the sum of two numbers", _two_numbers, lambda a, b: str(int(a) + int(b))),
    _general("subtract", "the difference of two numbers", _larger_first, lambda a, b: str(int(a) - int(b))),
    _general("larger", "the larger of two numbers", _two_numbers, lambda a, b: str(max(int(a), int(b)))),
    _general("parity", "even or odd", digits, lambda a: "odd" if int(a) % 2 else "even"),
    _general("series", "the next number of an arithmetic series", _progression, _next_number),
    _general("increase", "every digit one up, 9 to 0", digits, lambda a: shift_digits(a, 1)),
    Generator(
        "nested",
        "one skill applied to the result of another",
        _nested,
        lambda outer, inner, w: _OUTER[outer](_INNER[inner](w)),
        general=True,
        form="{0}({1}({2}))=",
    ),
)

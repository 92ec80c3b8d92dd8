"""The synthetic tasks: general skills, on which the embedded base was pre-trained, and demo tasks, held out from that."""

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
    spoken,
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


def _zigzag(text: str) -> str:
    return "".join(c.upper() if i % 2 else c for i, c in enumerate(text))


def _swap_pairs(text: str) -> str:
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def _mask(text: str) -> str:
    return "".join("x" if c in VOWELS else c for c in text)


def _loud(text: str) -> str:
    return "".join(c.upper() if c in VOWELS else c for c in text)


GENERAL: tuple[Generator, ...] = (
    Generator("copy", "the word itself", one_word(3, 10), lambda w: w),
    Generator("reverse", "the word backwards", one_word(3, 8), _INNER["reverse"]),
    Generator("upper", "the word in capitals", one_word(), str.upper),
    Generator("lower", "a word in capitals made small", lambda rng: word(rng).upper(), str.lower),
    Generator("swapcase", "small letters made capital and the reverse", _mixed_case, str.swapcase),
    Generator("capital", "the first letter made capital", one_word(), str.capitalize),
    Generator("sort", "the letters in alphabetical order", one_word(3, 6), lambda w: "".join(sorted(w))),
    Generator("unique", "each letter once, at its first place", _repeating, _INNER["unique"]),
    Generator("double", "every letter twice", one_word(3, 6), _OUTER["double"]),
    Generator("next", "every letter replaced by the next of the alphabet", one_word(), _OUTER["next"]),
    Generator("index", "the place of every letter in the alphabet", one_word(2, 4), _places),
    Generator("rotate", "the first letter moved to the end", one_word(), _INNER["rotate"]),
    Generator("swapends", "first and last letter exchanged", one_word(), _INNER["swapends"]),
    Generator("consonants", "the word without its vowels, or none", one_word(), _INNER["consonants"]),
    Generator("vowels", "only the vowels, or none", one_word(), _vowels),
    Generator("odd", "the letters at odd places", one_word(), lambda w: w[::2]),
    Generator("length", "the number of letters", one_word(3, 12), lambda w: str(len(w))),
    Generator("count", "how often a letter occurs", _word_and_letter, lambda w, c: str(w.count(c))),
    Generator("letter", "the letter at a place", _word_and_place, lambda w, i: w[int(i) - 1]),
    Generator("find", "the first place of a letter", _word_and_own_letter, lambda w, c: str(w.index(c) + 1)),
    Generator("first", "the first letters", _word_and_place, lambda w, i: w[: int(i)]),
    Generator("last", "the last letters", _word_and_place, lambda w, i: w[-int(i) :]),
    Generator("replace", "a letter replaced by another", _word_and_two_letters, str.replace),
    Generator("remove", "a word without one letter, or none", _word_and_letter, _without),
    Generator(
        "repeat",
        "a word several times",
        lambda rng: (word(rng, 2, 4), str(rng.randint(2, 4))),
        lambda w, i: w * int(i),
    ),
    Generator("join", "two words as one", _two_words, lambda a, b: a + b),
    Generator("zip", "two words, letter by letter in turn", _equal_lengths, _zip),
    Generator("equal", "whether two words are the same", _maybe_same, lambda a, b: "yes" if a == b else "no"),
    Generator("earlier", "the word that comes first in the alphabet", _two_words, min),
    Generator("spaced", "the letters with spaces between", one_word(3, 7), " ".join),
    Generator("quote", "the word in quotation marks", one_word(), lambda w: f'"{w}"'),
    Generator("pick", "one word of a phrase", _phrase_and_place, lambda p, i: p.split()[int(i) - 1]),
    Generator("words", "the number of words", phrase, lambda p: str(len(p.split()))),
    Generator("lookup", "the digit that belongs to a letter", _table_and_key, lambda t, k: t[t.index(k) + 1]),
    Generator("add", "the sum of two numbers", _two_numbers, lambda a, b: str(int(a) + int(b))),
    Generator("subtract", "the difference of two numbers", _larger_first, lambda a, b: str(int(a) - int(b))),
    Generator("larger", "the larger of two numbers", _two_numbers, lambda a, b: str(max(int(a), int(b)))),
    Generator("parity", "even or odd", digits, lambda a: "odd" if int(a) % 2 else "even"),
    Generator("series", "the next number of an arithmetic series", _progression, _next_number),
    Generator("increase", "every digit one up, 9 to 0", digits, lambda a: shift_digits(a, 1)),
    Generator(
        "nested",
        "one skill applied to the result of another",
        _nested,
        lambda outer, inner, w: _OUTER[outer](_INNER[inner](w)),
        form="{0}({1}({2}))=",
    ),
)


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

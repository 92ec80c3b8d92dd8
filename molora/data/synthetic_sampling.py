"""What a synthetic generator is, and the samplers of random arguments (words, lists, numbers) they share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"


Sampler = Callable[[random.Random], tuple[str, ...]]
Solver = Callable[..., str]


@dataclass(frozen=True)
class Generator:
    """One task: `sample` draws the arguments, `solve` is the exact answer as a pure function of them."""

    name: str
    description: str
    sample: Sampler
    solve: Solver
    general: bool
    form: str | None = None  # prompt as a format string over the arguments; None: name(a,b)=

    def item(self, rng: random.Random) -> tuple[str, str]:
        """One (prompt, target) pair."""
        arguments = self.sample(rng)
        if self.form is None:
            prompt = f"{self.name}({','.join(arguments)})="
        else:
            prompt = self.form.format(*arguments)
        return prompt, self.solve(*arguments)


def word(rng: random.Random, low: int = 4, high: int = 8) -> str:
    """A lower-case word of low..high letters: half of them pronounceable, half uniform letters."""
    length = rng.randint(low, high)
    if rng.random() < 0.5:
        return "".join(rng.choices(LETTERS, k=length))
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length))


def spoken(rng: random.Random) -> tuple[str, ...]:
    """A sampler of one pronounceable word of 4 to 8 letters: it always has vowels."""
    start = rng.randrange(2)
    length = rng.randint(4, 8)
    return ("".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length)),)


def few_letters(rng: random.Random, low: int = 4, high: int = 8) -> str:
    """A word over two to four different letters, so that letters repeat."""
    letters = rng.sample(LETTERS, rng.randint(2, 4))
    return "".join(rng.choices(letters, k=rng.randint(low, high)))


def phrase(rng: random.Random, low: int = 2, high: int = 4) -> str:
    """low..high short words separated by single spaces."""
    return " ".join(word(rng, 2, 4) for _ in range(rng.randint(low, high)))


def number(rng: random.Random, digits: int = 3) -> int:
    """A natural number of at most `digits` digits; short ones are as likely as long ones."""
    return rng.randrange(10 ** rng.randint(1, digits))


def digits(rng: random.Random, low: int = 3, high: int = 7) -> str:
    """A string of low..high digits."""
    return "".join(rng.choices("0123456789", k=rng.randint(low, high)))


def one_word(low: int = 4, high: int = 8) -> Sampler:
    """A sampler of a single word argument."""
    return lambda rng: (word(rng, low, high),)


def shift_letters(text: str, by: int) -> str:
    """Every lower-case letter moved along the alphabet, z followed by a; other characters stay."""
    return "".join(LETTERS[(LETTERS.index(c) + by) % 26] if c in LETTERS else c for c in text)

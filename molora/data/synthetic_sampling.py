"""What a synthetic generator is, and the samplers of random arguments (words, lists, numbers) they share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"

Sampler = Callable[[random.Random], str | tuple[str, ...]]
Solver = Callable[..., str]


@dataclass(frozen=True)
class Generator:
    """One task: `draw` gives the argument or arguments, `solve` the exact answer as a pure function of them.

    form: the prompt as a format string over the arguments; None: name(a,b)=
    """

    name: str
    description: str
    draw: Sampler
    solve: Solver
    general: bool = True
    form: str | None = None

    def sample(self, rng: random.Random) -> tuple[str, ...]:
        """Random arguments."""
        drawn = self.draw(rng)
        return (drawn,) if isinstance(drawn, str) else drawn

    def item(self, rng: random.Random) -> tuple[str, str]:
        """One (prompt, target) pair."""
        return self.compose(self.sample(rng))

    def compose(self, arguments: tuple[str, ...]) -> tuple[str, str]:
        """The (prompt, target) pair of these arguments."""
        prompt = self.form.format(*arguments) if self.form else f"{self.name}({','.join(arguments)})="
        return prompt, self.solve(*arguments)


def word(rng: random.Random, low: int = 4, high: int = 8) -> str:
    """A lower-case word of low..high letters: half of them pronounceable, half uniform letters."""
    length = rng.randint(low, high)
    if rng.random() < 0.5:
        return "".join(rng.choices(LETTERS, k=length))
    return alternating(rng, rng.randrange(2), length)


def spoken(rng: random.Random) -> str:
    """A pronounceable word of 4 to 8 letters: it always has vowels."""
    return alternating(rng, rng.randrange(2), rng.randint(4, 8))


def alternating(rng: random.Random, start: int, length: int) -> str:
    """So many letters, consonants and vowels in turn; the first is a vowel where `start` is odd."""
    return "".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length))


def few_letters(rng: random.Random) -> str:
    """A word of 4 to 8 letters over two to four different ones, so that letters repeat."""
    letters = rng.sample(LETTERS, rng.randint(2, 4))
    return "".join(rng.choices(letters, k=rng.randint(4, 8)))


def phrase(rng: random.Random) -> str:
    """2 to 4 short words separated by single spaces."""
    return " ".join(word(rng, 2, 4) for _ in range(rng.randint(2, 4)))


def number(rng: random.Random) -> int:
    """A natural number of at most three digits; short ones are as likely as long ones."""
    return rng.randrange(10 ** rng.randint(1, 3))


def digits(rng: random.Random) -> str:
    """A string of 3 to 6 digits."""
    return "".join(rng.choices("0123456789", k=rng.randint(3, 6)))


def one_word(low: int = 4, high: int = 8) -> Sampler:
    """A sampler of a word of low..high letters."""
    return partial(word, low=low, high=high)


def shift_letters(text: str, by: int) -> str:
    """Every lower-case letter moved along the alphabet, z followed by a; other characters stay."""
    return "".join(LETTERS[(LETTERS.index(c) + by) % 26] if c in LETTERS else c for c in text)


def shift_digits(text: str, by: int) -> str:
    """Every digit of a number moved along 0 to 9, 9 followed by 0."""
    return "".join(str((int(c) + by) % 10) for c in text)

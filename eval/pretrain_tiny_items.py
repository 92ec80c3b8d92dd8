"""What the embedded base is pre-trained on: items of the general synthetic skills, some of them in any printable characters."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from molora.data.synthetic import GENERATORS, split_of
from molora.data.synthetic_sampling import Generator

PAD, BOS, EOS = range(3)
FIRST_BYTE = 3  # the token of byte 0
SKILLS = [generator for generator in GENERATORS.values() if generator.general]
SPELT = {"sort", "index", "earlier", "add", "subtract", "larger", "parity", "series", "increase"}
"""Skills whose answers rest on the alphabet or on numbers: their items stay as they are."""
OTHERWISE = 0.25  # share of the items of all other skills in which letters become punctuation
POOL = 16  # batches drawn at once and sorted by length

Item = tuple[int, list[int], list[int]]  # skill index, prompt ids, target ids


def encode(prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of an item, the same as the tokenizer's but without its overhead."""
    ids = [[byte + FIRST_BYTE for byte in text.encode()] for text in (prompt, target)]
    return [BOS, *ids[0]], [*ids[1], EOS]


def in_any_characters(skill: Generator, rng: random.Random) -> tuple[str, str]:
    """An item of the skill in whose texts some letters are punctuation marks, each letter always the same mark.

    No mark is a comma where a comma parts the arguments. `nested` keeps the names of its skills.
    """
    *kept, text = skill.sample(rng) if skill.name == "nested" else ("\0".join(skill.sample(rng)),)
    letters = sorted({char for char in text if char.isalpha()})
    marks = string.punctuation if "\0" not in text else string.punctuation.replace(",", "")
    chosen = rng.sample(letters, rng.randint(1, len(letters)))
    swapped = text.translate(dict(zip(map(ord, chosen), rng.sample(marks, len(chosen)), strict=True)))
    return skill.compose((*kept, *swapped.split("\0")))


def draw(skill: Generator, rng: random.Random) -> tuple[str, str]:
    """A (prompt, target) pair of the skill, of either split."""
    if skill.name not in SPELT and rng.random() < OTHERWISE:
        return in_any_characters(skill, rng)
    return skill.item(rng)


def held_out(skill: Generator, n: int, seed: int) -> list[tuple[str, str]]:
    """`n` items in any characters that no training draws."""
    rng, items = random.Random(f"{skill.name}-any-{seed}"), dict[str, str]()
    while len(items) < n:
        prompt, target = in_any_characters(skill, rng)
        if split_of(prompt) == "eval":
            items[prompt] = target
    return list(items.items())


def pool(seed: int, index: int, weights: list[float], size: int) -> list[list[Item]]:
    """The `index`-th POOL batches of training items, skills drawn by weight, each batch of similar lengths.

    They depend on the arguments only, so that a run goes on where it was broken off.
    """
    rng, items = random.Random(f"pretrain-{seed}-{index}"), list[Item]()
    while len(items) < size * POOL:
        skill = rng.choices(range(len(SKILLS)), weights)[0]
        prompt, target = draw(SKILLS[skill], rng)
        if split_of(prompt) == "train":
            items.append((skill, *encode(prompt, target)))
    items.sort(key=lambda item: len(item[1]) + len(item[2]))
    chunks = [items[i : i + size] for i in range(0, len(items), size)]
    rng.shuffle(chunks)
    return chunks


def batches(seed: int, start: int, weights: list[float], size: int) -> Iterator[list[Item]]:
    """Batches without end, from the `start`-th on, a multiple of POOL. `weights` may change on the way."""
    index = start // POOL
    while True:
        yield from pool(seed, index, weights, size)
        index += 1

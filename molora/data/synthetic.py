"""Seeded synthetic tasks with exact answers: `generate(name, n, seed, split)` and the registry `GENERATORS`.

Every item reads `name(arguments)=answer`, for example `reverse(hello)=olleh`. The general skills were in the
pre-training of the embedded base `molora/tiny`; the demo tasks were not, so adapting to them is real.
"""

from __future__ import annotations

import random
import zlib
from types import MappingProxyType
from typing import Literal

from molora.data.synthetic_tasks import DEMO, GENERAL
from molora.errors import ConfigError, DataError

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
EVAL_SHARE = 10  # one prompt in ten goes to `eval`
MAX_MISSES = 2000  # draws in a row without a new item before a generator counts as exhausted

GENERATORS = MappingProxyType({generator.name: generator for generator in (*GENERAL, *DEMO)})


def split_of(prompt: str) -> Split:
    """The split of a prompt. It does not depend on the seed, so no prompt is ever in both."""
    return "eval" if zlib.crc32(prompt.encode()) % EVAL_SHARE == 0 else "train"


def generate(name: str, n: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`n` distinct items of one generator as `{"prompt": str, "target": str}`.

    The same arguments give the same items, and a shorter list is a prefix of a longer one. Raises ConfigError for
    an unknown generator or split, DataError when the generator has too few distinct items.
    """
    if name not in GENERATORS:
        raise ConfigError(f"unknown synthetic generator {name!r}; allowed: {', '.join(sorted(GENERATORS))}")
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of synthetic task {name!r}; allowed: {', '.join(SPLITS)}")
    generator = GENERATORS[name]
    rng = random.Random(f"{name}-{seed}-{split}")
    items: dict[str, str] = {}
    misses = 0
    while len(items) < n:
        if misses == MAX_MISSES:
            raise DataError(
                f"synthetic task {name!r} has only {len(items)} distinct {split} items, {n} were asked",
                hint="ask for fewer with train_size or eval_size",
            )
        prompt, target = generator.item(rng)
        if split_of(prompt) == split and prompt not in items:
            items[prompt] = target
            misses = 0
        else:
            misses += 1
    return [{"prompt": prompt, "target": target} for prompt, target in items.items()]

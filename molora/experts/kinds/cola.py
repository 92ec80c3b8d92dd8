"""COLA: an expert is a chain of a few LoRAs, each trained on what those before it have left.

    y = W x + s · (Σ_k B_k A_k) x,  k = 1 ... links; the last of them learns, those before it are held

After `every` steps a knot is tied: the link is held, and a new one begins with A drawn, B zero and an optimiser that knows
nothing of it (Frank and Wolfe's steps towards the best update of full rank). It is `relora` with few links and a rate that
does not rise again. Under a task gate, or in a sequence that adds an expert for each task, each task has a chain of its own.
Ours: the paper merges a link into the base's weight; here it stays in the chain, so tasks do not meet, and an export is one
LoRA of the sum of ranks. All links have the rank r / links; those of the paper may shrink along the chain.

Reference: COLA, arXiv:2401.04151.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from molora.experts.kinds.kind import About
from molora.experts.kinds.relora import ReLora


class Cola(ReLora):
    """A chain: ReLoRA's links, fewer of them."""

    about = About(
        "COLA, arXiv:2401.04151",
        "A and B of one link of each expert's chain at a time; the links before it are held",
        "when one small LoRA stops short of what full training reaches; set `every` to where its loss is flat",
    )
    name = "cola"
    settings: ClassVar[Mapping[str, int | float | str]] = {"links": 2, "every": 150, "rewarm": 0}

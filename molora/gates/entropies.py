"""How unsure a gate is: entropies of its probabilities, over that of an even choice among as many experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from molora.config.choices import ENTROPIES

# From `Σ p^index` (tokens,) and the index to an entropy; for an index other than 1.
Form = Callable[[Tensor, float], Tensor]


def relative_entropy(
    probs: Tensor, index: float = 1.0, choices: Tensor | None = None, form: str = "tsallis"
) -> Tensor:
    """Entropy (tokens,) of `index` over that of a uniform choice; 1 is Shannon's in every form; 0 for one expert.

    Args:
        probs: (tokens, expert).
        index: of the entropy.
        choices: (tokens,) how many experts each token may use, where that is not all of them.
        form: a name of `ENTROPIES`.
    """
    if choices is None:
        choices = probs.new_full((1,), probs.shape[-1])
    choices = choices.to(probs.dtype)
    if index == 1.0:
        found, largest = torch.special.entr(probs).sum(dim=-1), choices.log()
    else:
        entropy: Form = ENTROPIES[form]
        found, largest = entropy(probs.pow(index).sum(dim=-1), index), entropy(choices ** (1 - index), index)
    return torch.where(choices > 1, found / torch.where(choices > 1, largest, 1.0), 0.0)


def tsallis(power_sum: Tensor, index: float) -> Tensor:
    """`(1 - Σ p^q) / (q - 1)`, without the constant, which the largest one has too."""
    return 1 - power_sum


def renyi(power_sum: Tensor, index: float) -> Tensor:
    """`log(Σ p^q) / (1 - q)`, without the constant; as DynMoLE's `entropy_type: renyi` (mikecovlee/DynMoLE at 9354b27)."""
    return power_sum.log()

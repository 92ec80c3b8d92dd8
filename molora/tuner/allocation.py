"""How many experts each transformer block should have, from the spectra of its weights (AlphaLoRA)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from molora.disk.fingerprint import base_modules
from molora.errors import ConfigError
from molora.experts.spectra import allocate, hill_exponent
from molora.tuner.targets import block_index, matches


@torch.no_grad()
def expert_allocation(
    base: nn.Module,
    total: int,
    *,
    target_modules: Sequence[str] | str | None = None,
    beta: float = 2.5,
    least: int = 1,
) -> list[int]:
    """A list for `MoLoraConfig(num_experts=...)`: more experts for blocks whose weights are less well trained.

    Args:
        base: the model, not quantised; nothing is trained and no data is read.
        total: experts over all blocks.
        target_modules: suffixes or a regex of the linears whose spectra count; None: all of them.
        beta: how strongly the exponents tell; 0 gives every block as many.
        least: experts of the smallest block.

    Raises:
        ConfigError: no such linears, quantised weights, or fewer experts than blocks.

    Reference: AlphaLoRA, arXiv:2410.10054; see `molora.experts.spectra` for what is reconstructed.
    """
    exponents: dict[int, list[float]] = defaultdict(list)
    for name, module in base_modules(base):
        index = block_index(name)
        chosen = target_modules is None or matches(target_modules, name)
        if index is None or not chosen or not isinstance(module, nn.Linear):
            continue
        if not module.weight.is_floating_point():
            raise ConfigError(f"{name} is quantised; load the base in floating point to read its spectrum.")
        exponents[index].append(hill_exponent(module.weight))
    if not exponents or sorted(exponents) != list(range(len(exponents))):
        raise ConfigError(f"found linears in blocks {sorted(exponents)}; expected every block from 0 on.")
    means = [sum(exponents[i]) / len(exponents[i]) for i in range(len(exponents))]
    return allocate(means, total, beta, least)

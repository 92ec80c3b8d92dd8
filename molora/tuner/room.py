"""Whether there is memory for a layer's experts, asked before they are made: a system that runs out kills the process."""

from __future__ import annotations

import os
from contextlib import suppress

from torch import nn

from molora.config.mixture import SavedMixture
from molora.config.setting import numbers_of
from molora.errors import ConfigError
from molora.tuner.parts import rank_of
from molora.tuner.placement import experts_at

_ASKED_FROM = 2**30  # bytes: below that, asking costs more than it saves
_FLOAT32 = 4


def check_room(config: SavedMixture, key: str, base: nn.Module, d_in: int, d_out: int) -> None:
    """Raise ConfigError where the experts of the layer named `key` take more memory than is free, on a CPU.

    On other devices torch itself says so, and nothing is killed.
    """
    weight = getattr(base, "weight", None)
    if weight is None or weight.device.type != "cpu":
        return
    names = experts_at(config, key)
    each = _FLOAT32 * (d_in + d_out)
    ranks = [*numbers_of(config.r), *config.rank_pattern.values()]
    ranks += [rank for spec in config.expert_specs.values() for rank in (spec.r, *spec.rank_pattern.values())]
    if each * max(ranks) * len(names) < _ASKED_FROM:
        return
    needed = each * sum(rank_of(config, name, key) for name in names)
    if (free := free_memory()) is not None and needed > free:
        raise ConfigError(
            f"{len(names)} experts on {key} need {needed:,} bytes, {free:,} are free.",
            hint="lower num_experts or r, or target fewer layers.",
        )


def free_memory() -> int | None:
    """Bytes this machine can still give, or None where it does not say (other systems than Linux)."""
    with suppress(OSError, ValueError, IndexError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None

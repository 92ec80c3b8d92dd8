"""Which record comes when: the mix of tasks in an epoch, its order, and each process's share of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molora.errors import ConfigError


def mixing_counts(
    sizes: Sequence[int],
    mixing: str = "size",
    temperature: float = 2.0,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """How many records of each task an epoch of `sum(sizes)` records holds.

    p_i ∝ w_i · n_i (size), w_i (equal) or w_i · n_i^(1/T) (temperature); counts are p_i · Σn by largest
    remainder. By size with equal weights, that is every record once. Every task gets at least one record.
    """
    if temperature <= 0:
        raise ConfigError(f"mixing_temperature must be more than 0, not {temperature}.")
    powers = {"size": 1.0, "equal": 0.0, "temperature": 1.0 / temperature}
    if mixing not in powers:
        raise ConfigError(f"unknown mixing {mixing!r}; allowed: {', '.join(powers)}.")
    weights = weights or [1.0] * len(sizes)
    shares = [weight * size ** powers[mixing] for weight, size in zip(weights, sizes, strict=True)]
    exact = [share / sum(shares) * sum(sizes) for share in shares]
    counts = [int(value + 1e-9) for value in exact]  # 2.9999999 is 3 after a rounded division
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: sum(sizes) - sum(counts)]:
        counts[i] += 1
    return [max(1, count) for count in counts]


def epoch_order(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> Tensor:
    """Indices (sum of counts,) into the tasks' records laid end to end, shuffled: a pure function of its arguments.

    A task asked for more records than it has repeats them evenly: each comes ⌊count/size⌋ or ⌈count/size⌉ times.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    drawn, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        rounds = -(-count // size)
        rows = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])[:count]
        drawn.append(rows + start)
        start += size
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]


def shard(order: Tensor, rank: int, world_size: int) -> Tensor:
    """Every `world_size`-th index from `rank` on; the first ones are repeated until every process has the same number."""
    missing = -len(order) % world_size
    repeated = order.repeat(-(-missing // len(order)) + 1)[: len(order) + missing]
    return repeated[rank::world_size]


def this_process() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) outside distributed training."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class Halves:
    """Every task's records in two halves that never meet, a pure function of sizes and seed.

    Args:
        sizes: records of each task.
        counts: how many an epoch has of each, in both halves together.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], seed: int) -> None:
        if min(sizes) < 2:
            raise ConfigError(
                "halves of the data need two training records of every task, and one has a single one.",
                hint="use another adapter.kind than bilora, or more records.",
            )
        generator, start = torch.Generator().manual_seed(seed), 0
        members: tuple[list[Tensor], list[Tensor]] = [], []
        for size in sizes:
            drawn = torch.randperm(size, generator=generator) + start
            for half in (0, 1):
                members[half].append(drawn[half::2].sort().values)
            start += size
        self.members = [torch.cat(parts) for parts in members]
        self._sizes = [[len(part) for part in parts] for parts in members]
        self._counts = [[max(1, (count + 1 - half) // 2) for count in counts] for half in (0, 1)]
        self._seed = seed
        self.records = [sum(counts) for counts in self._counts]

    def order(self, half: int, epoch: int) -> Tensor:
        """Indices of one half's records, shuffled, as of `epoch_order`."""
        seed = 2 * self._seed + half
        return self.members[half][epoch_order(self._sizes[half], self._counts[half], seed, epoch)]

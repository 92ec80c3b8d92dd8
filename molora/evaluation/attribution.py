"""Shapley values: how much of a score each expert accounts for, over all the company it can be in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations
from math import factorial

MOST = 8
"""Experts that are attributed at most: every one more doubles the scores that are needed."""

Coalition = frozenset[str]


def coalitions(players: Sequence[str]) -> Iterator[Coalition]:
    """All 2^n subsets, the empty one first, the whole last."""
    sizes = range(len(players) + 1)
    return map(frozenset, chain.from_iterable(combinations(players, size) for size in sizes))


def shapley(value: Mapping[Coalition, float], players: Sequence[str]) -> dict[str, float]:
    """Each player's mean contribution over all orders in which they could join.

    Args:
        value: of every subset of the players; see `coalitions`.
        players: distinct.

    Returns: by player; they sum to the value of all less that of none. Reference: Shapley, A Value for n-Person Games, 1953.
    """
    n, found = len(players), dict.fromkeys(players, 0.0)
    for together in coalitions(players):
        for player in players:
            if player not in together:
                share = factorial(len(together)) * factorial(n - len(together) - 1) / factorial(n)
                found[player] += share * (value[together | {player}] - value[together])
    return found

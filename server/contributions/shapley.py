"""Shapley's value of each player: its marginal contribution, averaged over all orders in which players come.

For a game with n players and a value v(S) of each coalition S (Shapley 1953),

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S with i) - v(S))

which adds up to v(all) - v(none), is the same for players who are alike, and 0 for one that changes nothing.
`exact` is this sum, of 2^n values. `sampled` averages over random orders and truncates (Ghorbani and Zou
2019, TMC-Shapley, algorithm 1): where those who have come are worth v(all) to within a tolerance, nobody who
comes later contributes. The orders are GTG-Shapley's guided ones (Liu et al. 2022): each player comes first
equally often, for first places have the largest contributions and vary most; without truncation the mean
stays Shapley's value. As there, all contribute nothing where v(all) is v(none) to within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from atoll.server.contributions.leave_one_out import Game


def shapley(
    players: int, value: Game, *, permutations: int, truncation: float, generator: torch.Generator
) -> list[float]:
    """The players' values, [players]: exact where that takes no more merges than `permutations` may take."""
    if 2**players <= permutations * players:
        return exact(players, value)
    return sampled(players, value, orders(players, permutations, generator), truncation)


def exact(players: int, value: Game) -> list[float]:
    """The players' values by the sum over all coalitions, [players].

    >>> exact(2, {(): 0.0, (0, 1): 5.0, (0,): 3.0, (1,): 4.0}.__getitem__)
    [2.0, 3.0]
    """
    values = [0.0] * players
    for i in range(players):
        others = [j for j in range(players) if j != i]
        for size in range(players):
            part = 1 / (players * math.comb(players - 1, size))
            for coalition in combinations(others, size):
                values[i] += part * (value(tuple(sorted((*coalition, i)))) - value(coalition))
    return values


def orders(players: int, count: int, generator: torch.Generator) -> Iterator[list[int]]:
    """`count` random orders of the players, and up to as many more as let each come first equally often."""
    for number in range(-(-count // players) * players):
        first = number % players
        order: list[int] = torch.randperm(players, generator=generator).tolist()
        yield [first, *(i for i in order if i != first)]


def sampled(
    players: int, value: Game, orders: Iterator[list[int]] | Sequence[list[int]], truncation: float
) -> list[float]:
    """The players' mean marginal contributions over the orders, [players], truncated at the tolerance."""
    whole, nothing = value(tuple(range(players))), value(())
    sums, count = [0.0] * players, 0
    if abs(whole - nothing) <= truncation:
        return sums
    for order in orders:
        before, count = nothing, count + 1
        for place, player in enumerate(order):
            if place and abs(whole - before) <= truncation:
                break
            after = value(tuple(sorted(order[: place + 1])))
            sums[player] += after - before
            before = after
    return [total / count for total in sums]

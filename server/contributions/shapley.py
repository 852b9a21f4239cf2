"""Shapley values: each player's marginal contribution, averaged over all orders in which players can join.

For a game with n players and a value v(S) of each coalition S (Shapley 1953),

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S with i) - v(S))

The values add up to v(all) - v(none), are equal for interchangeable players, and 0 for a player that changes
no coalition's value. `exact` computes this sum from 2^n values of v. `sampled` averages over random orders
and truncates (Ghorbani and Zou 2019, TMC-Shapley, algorithm 1): once the players that have joined are worth
v(all) to within a tolerance, later ones get 0 in this order. The orders are those of GTG-Shapley (Liu et al.
2022): every player comes first equally often, because contributions in first place are largest and vary
most; without truncation the expected mean is still the Shapley value. As in GTG-Shapley, all values are 0 if
v(all) is v(none) to within the tolerance.
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
    """The players' Shapley values, [players].

    Exact if the 2^players coalitions are no more than the values that `permutations` orders may need, else
    estimated from that many orders, truncated at the tolerance `truncation`, in units of v.
    """
    if 2**players <= permutations * players:
        return exact(players, value)
    return sampled(players, value, orders(players, permutations, generator), truncation)


def exact(players: int, value: Game) -> list[float]:
    """The players' Shapley values by the sum over all coalitions, [players].

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
    """At least `count` random orders of the players, so many that each player comes first equally often."""
    for number in range(-(-count // players) * players):
        first = number % players
        order: list[int] = torch.randperm(players, generator=generator).tolist()
        yield [first, *(i for i in order if i != first)]


def sampled(
    players: int, value: Game, orders: Iterator[list[int]] | Sequence[list[int]], truncation: float
) -> list[float]:
    """The players' mean marginal contributions over the orders, [players], truncated at `truncation`."""
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

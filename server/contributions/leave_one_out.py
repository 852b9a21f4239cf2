"""Leave-one-out contributions: the value of all updates minus the value without one client's update.

For a game with players N and a value v(S) of each coalition S, player i's contribution is v(N) - v(N without
i). It takes one merge more than there are players. Two clients with the same data get small contributions,
because each can replace the other; Shapley values divide their joint contribution between them instead.
"""

from __future__ import annotations

from collections.abc import Callable

Coalition = tuple[int, ...]
"""Players, numbered from 0, in ascending order."""
Game = Callable[[Coalition], float]
"""The value of a coalition; NaN where it is undefined."""


def leave_one_out(players: int, value: Game) -> list[float]:
    """v(N) - v(N without i) of each player i, [players].

    >>> leave_one_out(2, {(0, 1): 5.0, (0,): 3.0, (1,): 4.0}.__getitem__)
    [1.0, 2.0]
    """
    everybody = tuple(range(players))
    whole = value(everybody)
    return [whole - value(everybody[:i] + everybody[i + 1 :]) for i in everybody]

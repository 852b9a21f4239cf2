"""What is lost without a client: the value of all updates minus that of all others'.

For a game with players N and a value v(S) of each coalition S, player i's is v(N) - v(N without i). It needs
one merge more than there are players. Of two clients with the same data neither contributes much by it, for
each makes up for the other; Shapley's value shares what they add between them.
"""

from __future__ import annotations

from collections.abc import Callable

Coalition = tuple[int, ...]
"""Players by their numbers from 0, in order."""
Game = Callable[[Coalition], float]
"""What a coalition is worth; NaN where that is undefined."""


def leave_one_out(players: int, value: Game) -> list[float]:
    """v(N) - v(N without i) of each player i, [players].

    >>> leave_one_out(2, {(0, 1): 5.0, (0,): 3.0, (1,): 4.0}.__getitem__)
    [1.0, 2.0]
    """
    everybody = tuple(range(players))
    whole = value(everybody)
    return [whole - value(everybody[:i] + everybody[i + 1 :]) for i in everybody]

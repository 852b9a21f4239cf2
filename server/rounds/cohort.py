"""Who takes part in a round, drawn from the job's own stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from atoll.job.job import Job
from atoll.job.privacy import separation
from atoll.protocol.random_streams import stream
from atoll.strategies.options import trusted_client


def sample(
    population: Sequence[str], job: Job, round: int, uniforms: Callable[[int], torch.Tensor] | None = None
) -> list[str]:
    """The round's cohort, sorted: a fixed number without replacement, or each client by a coin.

    More are asked than the number by the factor `over_sampling`, where only the first to answer count.
    Where privacy rests on the coins, `uniforms` are others than anybody can throw who has the job; where it
    rests on rounds between a client's rounds, cohorts are drawn from groups that take turns. A client that
    the strategy trusts is asked in every round, as one of that number.
    """
    root = trusted_client(job)
    if root is None:
        return _drawn(population, job, round, uniforms)
    others = [name for name in population if name != root]
    return sorted([root, *_drawn(others, job, round, uniforms, besides=1)])


def _drawn(
    population: Sequence[str],
    job: Job,
    round: int,
    uniforms: Callable[[int], torch.Tensor] | None,
    besides: int = 0,
) -> list[str]:
    """A cohort without the `besides` that are in it anyway."""
    generator = stream(job.seed, "cohort", round)
    rate, count = job.federation.cohort_rate, job.federation.cohort
    if rate is not None:
        number = len(population)
        thrown = (
            torch.rand(number, generator=generator, dtype=torch.float64)
            if uniforms is None
            else uniforms(number)
        )
        return [population[i] for i in (thrown < rate).nonzero().flatten().tolist()]
    if count is None:
        return list(population)
    asked, apart = round_up(count * job.federation.over_sampling) - besides, separation(job)
    if apart == 1:
        return some(population, asked, generator)
    places = group(len(population), apart, round % apart, job.seed)
    return [population[places[i]] for i in some_places(len(places), asked, generator)]


@lru_cache(maxsize=64)
def group(clients: int, groups: int, number: int, seed: int) -> tuple[int, ...]:
    """The places of the clients in one of the groups that a seeded permutation is cut into, in order.

    >>> sorted(group(5, 2, 0, seed=1) + group(5, 2, 1, seed=1))
    [0, 1, 2, 3, 4]
    """
    order = torch.randperm(clients, generator=stream(seed, "groups"))
    return tuple(order[number::groups].sort().values.tolist())


def some(population: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` different names, every set of them equally likely, sorted; all where there are no more.

    Floyd's algorithm (Bentley and Floyd 1987): its work depends on the sample, not on the population.
    """
    return [population[i] for i in some_places(len(population), count, generator)]


def some_places(number: int, count: int, generator: torch.Generator) -> Sequence[int]:
    """`count` different whole numbers below `number`, as `some` draws them."""
    if count >= number:
        return range(number)
    chosen: set[int] = set()
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    for last, u in zip(range(number - count, number), uniform, strict=True):
        place = int(u * (last + 1))
        chosen.add(last if place in chosen else place)
    return sorted(chosen)


def round_up(value: float) -> int:
    """The smallest integer that is not below, forgiving the last bits of a float."""
    return int(-(-(value - 1e-9) // 1))

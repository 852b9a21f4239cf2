"""Samples a round's cohort, from a random stream of the job's seed."""

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
    """The names of the round's cohort, sorted.

    With `federation.cohort` it is a fixed number, drawn without replacement and enlarged by the factor
    `over_sampling`, of which only the first to answer count. With `cohort_rate` each client is drawn
    independently (Poisson sampling). `uniforms` returns secret numbers for these draws, where a privacy
    guarantee relies on them; otherwise they follow the job's seed. With banded noise, cohorts are drawn from
    groups of clients that take turns. The client that the strategy trusts is part of every cohort.
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
    """A cohort drawn from `population`, smaller by the `besides` clients that are added to it anyway."""
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
    invited, apart = round_up(count * job.federation.over_sampling) - besides, separation(job)
    if apart == 1:
        return some(population, invited, generator)
    places = group(len(population), apart, round % apart, job.seed)
    return [population[places[i]] for i in some_places(len(places), invited, generator)]


@lru_cache(maxsize=64)
def group(clients: int, groups: int, number: int, seed: int) -> tuple[int, ...]:
    """The sorted indices of the clients in group `number` of `groups`, which divide a seeded permutation.

    >>> sorted(group(5, 2, 0, seed=1) + group(5, 2, 1, seed=1))
    [0, 1, 2, 3, 4]
    """
    order = torch.randperm(clients, generator=stream(seed, "groups"))
    return tuple(order[number::groups].sort().values.tolist())


def some(population: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` different names, sorted, every set equally likely; all names where there are no more.

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
    """The value rounded up to a whole number, after rounding errors in its last bits are taken off."""
    return int(-(-(value - 1e-9) // 1))

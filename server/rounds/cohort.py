"""Who takes part in a round, drawn from the job's own stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from atoll.job.job import Job
from atoll.protocol.random_streams import stream


def sample(
    population: Sequence[str], job: Job, round: int, uniforms: Callable[[int], torch.Tensor] | None = None
) -> list[str]:
    """The round's cohort, sorted: a fixed number without replacement, or each client by a coin.

    More are asked than the number by the factor `over_sampling`, where only the first to answer count.
    Where privacy rests on the coins, `uniforms` are others than anybody can throw who has the job.
    """
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
    return some(population, round_up(count * job.federation.over_sampling), generator)


def some(population: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` different names, every set of them equally likely, sorted; all where there are no more.

    Floyd's algorithm (Bentley and Floyd 1987): its work depends on the sample, not on the population.
    """
    if count >= len(population):
        return list(population)
    chosen: set[int] = set()
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    for last, u in zip(range(len(population) - count, len(population)), uniform, strict=True):
        place = int(u * (last + 1))
        chosen.add(last if place in chosen else place)
    return [population[i] for i in sorted(chosen)]


def round_up(value: float) -> int:
    """The smallest integer that is not below, forgiving the last bits of a float."""
    return int(-(-(value - 1e-9) // 1))

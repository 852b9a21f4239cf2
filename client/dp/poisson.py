"""Sets up DP-SGD for a round: Poisson sampling, clipping and the source of the noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from atoll.client.dp.adaptive_norms import AdaptiveNorm
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.example_draws import Numbers, seeded_coins
from atoll.job.job import Job
from atoll.privacy.adaptive_clipping import multiplier_of_sum
from atoll.privacy.dp_plan import DpPlan
from atoll.privacy.noise import RandomBits, entropy, seeded, uniform
from atoll.protocol.random_streams import stream_seed


def private_training(job: Job, dp_plan: DpPlan, round: int, charged: Mapping[str, int]) -> DpSgd:
    """The DP-SGD settings of a round; `charged` has each client's number of charged rounds with this one."""

    def random_bits(client: str) -> RandomBits:
        if job.privacy.seeded_noise:
            return seeded(stream_seed(job.seed, "noise", round, client))
        return entropy

    def draw(client: str, numbers: Numbers) -> list[NDArray[np.int64]]:
        steps, count = dp_plan.per_round, len(numbers)
        if job.privacy.seeded_noise:
            coins = seeded_coins(numbers, steps, job.seed, "poisson", round, client)
        else:
            coins = uniform(entropy(steps * count)).reshape(steps, count)
        return [np.flatnonzero(row < dp_plan.event.sampling_rate) for row in coins]

    adaptive = _adaptive_norm(job, dp_plan, round)
    noise = dp_plan.noise_multiplier
    return DpSgd(
        clipping_norm=dp_plan.promise.clipping_norm,
        noise_multiplier=multiplier_of_sum(noise, adaptive.count_deviation) if adaptive else noise,
        divisor=dp_plan.divisor if dp_plan.where == "client" else 1.0,
        random_bits=random_bits,
        draw=draw,
        charged=charged,
        adaptive=adaptive,
    )


def _adaptive_norm(job: Job, dp_plan: DpPlan, round: int) -> AdaptiveNorm | None:
    """How clipping norms follow their quantile; None where the norm is fixed."""
    promise = dp_plan.promise
    if promise.clipping == "fixed":
        return None
    assert dp_plan.count_deviation is not None

    def random_bits(client: str) -> RandomBits:
        if job.privacy.seeded_noise:
            return seeded(stream_seed(job.seed, "count noise", round, client))
        return entropy

    return AdaptiveNorm(
        quantile=promise.quantile,
        lr=promise.clipping_lr,
        count_deviation=dp_plan.count_deviation,
        expected_batch=dp_plan.divisor,
        random_bits=random_bits,
    )

"""Example-level privacy of a round's local training: the coins, the noise, and the charge before both."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.example_draws import Numbers, seeded_coins
from atoll.job.job import Job
from atoll.privacy.dp_plan import DpPlan
from atoll.privacy.noise import RandomBits, entropy, seeded, uniform
from atoll.protocol.random_streams import stream_seed


def private_training(job: Job, dp_plan: DpPlan, round: int, charged: Mapping[str, int]) -> DpSgd:
    """How the clients of a round train, who have been charged for it."""

    def words(client: str) -> RandomBits:
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

    return DpSgd(
        clipping_norm=dp_plan.promise.clipping_norm,
        noise_multiplier=dp_plan.noise_multiplier,
        divisor=dp_plan.divisor if dp_plan.where == "client" else 1.0,
        random_bits=words,
        draw=draw,
        charged=charged,
    )

"""A clipping norm that follows a quantile of the updates' norms, estimated with differential privacy.

Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", section 3. Each client
reports whether its norm was within the clipping norm, as b - 1/2, so that one client moves the sum of
them by 1/2; the sum is noised with deviation `count_deviation`. The norm that follows from this round's
reports is used from the next round on: a norm that depended on the updates it clips would bound nothing.
"""

from __future__ import annotations

import math


def multiplier_of_sum(noise_multiplier: float, count_deviation: float) -> float:
    """The noise multiplier left for the sum of updates, so that both releases together cost as one.

    Theorem 1: (z_sum^-2 + (2 count_deviation)^-2)^(-1/2) = z.

    Raises:
        ValueError: the count alone costs more than both may.
    """
    if not 2 * count_deviation > noise_multiplier:
        raise ValueError(
            f"count_deviation must be > noise_multiplier / 2 = {noise_multiplier / 2}, got {count_deviation}"
        )
    return float((noise_multiplier**-2 - (2 * count_deviation) ** -2) ** -0.5)


def noised_fraction(within: int, answered: int, *, noise: float, expected_cohort: float) -> float:
    """The noised fraction of the expected cohort within the norm: (sum of (b - 1/2) + noise) / m + 1/2.

    `noise` is drawn with deviation `count_deviation`, and m is the expected cohort. Clients that didn't
    answer count as one half, which biases the estimate and reveals nothing.
    """
    return (within - answered / 2 + noise) / expected_cohort + 0.5


def update_clipping_norm(norm: float, fraction: float, *, quantile: float, lr: float) -> float:
    """The next clipping norm: smaller where more than `quantile` of the norms were within it.

    A fraction that noise carried beyond 0 or 1 counts as 0 or 1.
    """
    return norm * math.exp(-lr * (min(max(fraction, 0.0), 1.0) - quantile))

"""What noise that is correlated over rounds gains: the error of the sums of rounds, at equal epsilon.

The model after round t follows the sum of the rounds until t. Closed forms, nothing is trained: the root
of the mean squared error of one number of those sums, over all rounds, in clipping norms. Four ways to
promise the same epsilon are compared, in all of which a client takes part in one of b rounds on average:

- every round: independent noise, each client charged for every round, as with any cohorts of fixed size;
- apart: independent noise, but a client takes part once at most in any b rounds, and is charged so;
- banded: the same cohorts, and noise with b bands;
- sampled: independent noise, and Poisson sampling of clients at a rate of 1 / b, where that can be had.

    python -m benchmarks.banded [--delta 1e-5]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np

from atoll.privacy.accounting import calibrate
from atoll.privacy.banded import coefficients
from atoll.privacy.dp_plan import planned_sensitivity

ROUNDS = (50, 200, 1000)
BANDS = (2, 10, 50)
EPSILONS = (2.0, 8.0)


def prefix_error(rounds: int, column: Sequence[float]) -> float:
    """Of noise of deviation 1 under the inverse of a lower triangular Toeplitz matrix with that column."""
    inverse = np.zeros(rounds)
    inverse[0] = 1 / column[0]
    for t in range(1, rounds):
        past = inverse[max(0, t - len(column) + 1) : t][::-1]
        inverse[t] = -float(np.dot(column[1 : len(past) + 1], past)) / column[0]
    until = np.cumsum(np.square(np.cumsum(inverse)))  # variance of the noise in the sum of the first t rounds
    return math.sqrt(float(until.mean()))


def errors(rounds: int, bands: int) -> tuple[float, float, float]:
    """(every round, apart, banded), for a noise multiplier of 1 per unit of sensitivity."""
    independent, apart = prefix_error(rounds, (1.0,)), math.ceil(rounds / bands)
    banded = planned_sensitivity(rounds, bands) * prefix_error(rounds, coefficients(bands))
    return math.sqrt(rounds) * independent, math.sqrt(apart) * independent, banded


def main() -> None:
    """Print a line for each number of rounds, bands and epsilon."""
    parser = argparse.ArgumentParser(description="What correlated noise gains.")
    parser.add_argument("--delta", type=float, default=1e-5)
    delta = parser.parse_args().delta
    print(f"error of the sums of rounds in clipping norms, delta {delta:g}")
    print("rounds  bands  epsilon  every round     apart    banded   sampled  banded / every round")
    for rounds in ROUNDS:
        for bands in (b for b in BANDS if b <= rounds):
            for epsilon in EPSILONS:
                noise = calibrate(epsilon, delta=delta, sampling_rate=1.0, releases=1)
                every, apart, banded = (noise * error for error in errors(rounds, bands))
                poisson = calibrate(epsilon, delta=delta, sampling_rate=1 / bands, releases=rounds)
                sampled = poisson * prefix_error(rounds, (1.0,))
                print(
                    f"{rounds:>6} {bands:>6} {epsilon:>8g} {every:>12.1f} {apart:>9.1f} {banded:>9.1f}"
                    f" {sampled:>9.1f} {banded / every:>21.3f}"
                )


if __name__ == "__main__":
    main()

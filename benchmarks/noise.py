"""What exact discrete noise costs, beside float noise by the inverse of the normal distribution.

Both draw from the operating system's entropy and give whole multiples of one grid. They take turns;
medians, as nanoseconds a number, and the ratio of the two.

    python -m benchmarks.noise [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from atoll.privacy.noise import Lattice, entropy

COUNTS = (400, 10_000, 100_000, 1_000_000)
DEVIATION = 1.3


def by_inverse(lattice: Lattice, count: int) -> NDArray[np.float64]:
    """A normal number for each random word, rounded to the grid."""
    quantile = ((entropy(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    drawn: NDArray[np.float64] = ndtri(quantile) * (lattice.deviation / lattice.granularity)
    return np.rint(drawn) * lattice.granularity


def main() -> None:
    """Print a line for each count of numbers."""
    parser = argparse.ArgumentParser(description="What exact discrete noise costs.")
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    lattice = Lattice(DEVIATION, entropy)
    lattice.noise(1)  # its table is made once
    print(f"{'numbers':>9}  {'inverse':>9}  {'exact':>9}  ratio   (ns a number)")
    for count in COUNTS:
        ways = {"inverse": partial(by_inverse, lattice, count), "exact": partial(lattice.noise, count)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, draw in ways.items():
                began = time.perf_counter()
                draw()
                seconds[name].append(time.perf_counter() - began)
        inverse, exact = (statistics.median(seconds[name]) * 1e9 / count for name in ("inverse", "exact"))
        print(f"{count:>9}  {inverse:>9.1f}  {exact:>9.1f}  {exact / inverse:.2f}")


if __name__ == "__main__":
    main()

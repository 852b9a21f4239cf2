"""What must hold of a private release, as checks that a broken one fails.

They look at what real code does, not at how it is configured: they replay it on neighbouring data,
measure its noise, count its releases. Each raises `Detected` and says what is wrong. They are for
tests, ours and those of people who write mechanisms of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.privacy.accounting import Composition, Release
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors

Vector = NDArray[np.float64]

SILENT_WORD = 0
"""A random word that makes no noise: it proposes 0, and accepts it."""
SLACK = 1e-4
"""Relative, for what float32 rounds."""


class Detected(AssertionError):
    """A privacy mechanism doesn't do what it must."""


def silent(count: int) -> NDArray[np.uint64]:
    """Words with which a mechanism adds no noise, to look at what it would noise."""
    return np.full(count, SILENT_WORD, dtype=np.uint64)


def adversaries(model: Tensors, round: int = 1) -> Iterator[Update]:
    """Updates that a broken sum lets through: huge, not finite, zero, heavy, in one tensor only."""
    for name, value in (("huge", 1e30), ("large", 1e6), ("tiny", 1e-30), ("zero", 0.0)):
        yield Update(name, round, {n: torch.full_like(t, value) for n, t in model.items()}, 1)
    for name, value in (("nan", math.nan), ("inf", math.inf), ("minus inf", -math.inf)):
        delta = {n: torch.zeros_like(t) for n, t in model.items()}
        first = next(iter(delta.values()))
        first.reshape(-1)[0] = value
        yield Update(name, round, delta, 1)
    yield Update("heavy", round, {n: torch.full_like(t, 3.0) for n, t in model.items()}, 1_000_000)
    for chosen in model:
        delta = {n: torch.full_like(t, 7.0 if n == chosen else 0.0) for n, t in model.items()}
        yield Update(f"all in {chosen}", round, delta, 1)


def check_sensitivity(
    total: Callable[[Sequence[Any]], Vector], people: Sequence[Any], others: Sequence[Any], bound: float
) -> None:
    """One contribution that comes or goes moves the sum by `bound` (L2) at most, a replaced one by twice.

    `total` is what the mechanism would noise, of `people`; each of `others` joins them, and takes the
    place of one.
    """
    before = _finite(total(list(people)), "the sum of ordinary contributions")
    for other in others:
        name = getattr(other, "client", other)
        joined = _finite(total([*people, other]), f"the sum with {name!r}")
        _check_moved(joined - before, bound, f"{name!r} joins")
        replaced = _finite(total([*people[1:], other]), f"the sum with {name!r} instead")
        _check_moved(replaced - before, 2 * bound, f"{name!r} takes a place")
    for place in range(len(people)):
        left = _finite(total([*people[:place], *people[place + 1 :]]), "the sum without one")
        _check_moved(left - before, bound, "one leaves")


def _finite(values: Vector, what: str) -> Vector:
    if not bool(np.isfinite(values).all()):
        raise Detected(f"{what} is not finite")
    return values


def _check_moved(difference: Vector, bound: float, what: str) -> None:
    moved = float(np.linalg.norm(difference))
    if moved > bound * (1 + SLACK):
        raise Detected(f"the sum moves by {moved:.4g} when {what}, allowed are {bound:.4g}")


def check_noise(noise: Vector, deviation: float, *, tolerance: float = 0.005) -> None:
    """A million draws and more have that deviation, to 0.5 %, a mean of zero and a Gaussian's tails."""
    if len(noise) < 1_000_000:
        raise ValueError(f"expected at least 1,000,000 draws, got {len(noise)}")
    found = float(noise.std())
    if not abs(found / deviation - 1) <= tolerance:
        raise Detected(f"the noise's deviation is {found:.5g}, must be {deviation:.5g}")
    if abs(float(noise.mean())) > 5 * deviation / math.sqrt(len(noise)):
        raise Detected(f"the noise's mean is {noise.mean():.3g}, must be 0")
    beyond = float((np.abs(noise) > 3 * deviation).mean())
    if not 0.0022 < beyond < 0.0032:  # a Gaussian has 0.0027 there
        raise Detected(
            f"a part of {beyond:.4f} of the noise is beyond three deviations, a Gaussian has 0.0027"
        )


def check_independence(releases: Sequence[Vector]) -> None:
    """No two vectors of noise (of rounds, tensors, clients) repeat or follow each other."""
    for (i, a), (j, b) in combinations(enumerate(releases), 2):
        size = min(len(a), len(b))
        if bool((a[:size] == b[:size]).mean() > 0.01):
            raise Detected(f"noise {i} is repeated in noise {j}")
        found = float(np.corrcoef(a[:size], b[:size])[0, 1])
        if abs(found) > 5 / math.sqrt(size):
            raise Detected(f"noise {i} and noise {j} have a correlation of {found:.3f}")


def check_lattice(released: Vector, granularity: float) -> None:
    """Every number is a whole multiple of the granularity, so that no low bits tell of what is beneath."""
    if not bool((np.rint(released / granularity) * granularity == released).all()):
        raise Detected(f"released numbers are not multiples of {granularity:.3g}")


def check_ledger(charged: Composition, observed: Mapping[Release, int]) -> None:
    """What was released is in the ledger: as often, and with no less cost than it had."""
    for release, count in observed.items():
        as_dear = [r for r in charged if _costs_as_much(r, release)]
        if sum(charged[r] for r in as_dear) < count:
            raise Detected(f"{count} releases of {release} were made, {dict(charged)} is in the ledger")


def _costs_as_much(charged: Release, real: Release) -> bool:
    return charged.noise_multiplier <= real.noise_multiplier * (
        1 + SLACK
    ) and charged.sampling_rate >= real.sampling_rate * (1 - SLACK)


def check_sampler(draws: Sequence[Sequence[int]], population: int, rate: float) -> None:
    """Units are drawn by Poisson's coins: at the rate, in batches of varying size, each draw anew."""
    taken = np.zeros((len(draws), population), dtype=bool)
    for row, drawn in zip(taken, draws, strict=True):
        row[list(drawn)] = True
        if len(set(drawn)) != len(drawn):
            raise Detected("a unit was drawn twice in one batch")
    flips = taken.size
    error = 5 * math.sqrt(rate * (1 - rate) / flips)
    if abs(float(taken.mean()) - rate) > max(error, 1e-12):
        raise Detected(f"units are drawn at a rate of {taken.mean():.4f}, must be {rate}")
    sizes = taken.sum(axis=1)
    expected = population * rate * (1 - rate)
    spread = 5 * expected * math.sqrt(2 / (len(draws) - 1))
    if abs(float(sizes.var(ddof=1)) - expected) > spread:
        raise Detected(f"batch sizes have variance {sizes.var(ddof=1):.2f}, Poisson's coins {expected:.2f}")
    again = float((taken[1:] & taken[:-1]).mean())
    error = 5 * math.sqrt(rate**2 * (1 - rate**2) / taken[1:].size)
    if abs(again - rate**2) > max(error, 1e-12):
        raise Detected(f"a part of {again:.4f} is drawn twice running, coins give {rate**2:.4f}")


def check_silence(told: Any, told_of_other_data: Any, where: str = "what was told") -> None:
    """Two data sets, and nothing that is told without noise differs: walk through both and compare."""
    if isinstance(told, Mapping) and isinstance(told_of_other_data, Mapping):
        for key in sorted({*told, *told_of_other_data}, key=str):
            if key not in told or key not in told_of_other_data:
                raise Detected(f"{where}.{key} is there for some data only")
            check_silence(told[key], told_of_other_data[key], f"{where}.{key}")
    elif isinstance(told, Sequence) and not isinstance(told, str | bytes):
        if len(told) != len(told_of_other_data):
            raise Detected(f"{where} has {len(told)} parts or {len(told_of_other_data)}, as the data is")
        for place, (a, b) in enumerate(zip(told, told_of_other_data, strict=True)):
            check_silence(a, b, f"{where}[{place}]")
    elif isinstance(told, torch.Tensor):
        if not torch.equal(told, told_of_other_data):
            raise Detected(f"{where} depends on the data")
    elif told != told_of_other_data:
        raise Detected(f"{where} is {told!r} or {told_of_other_data!r}, as the data is")

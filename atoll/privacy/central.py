"""Client-level privacy at a trusted server: one noise on the sum of a round's clipped updates.

Guarantee: (epsilon, delta) for one client's whole participation, neighbours differing by adding or
removing one client, against everyone who sees the models but not the updates; the server sees the
updates and is trusted. Epsilon comes from `privacy.accounting` for the releases that were
recorded. Not covered: which clients were asked, how long rounds took, what clients say elsewhere.

McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", with equal weights
and a fixed divisor: the expected cohort, a public number, never who happened to answer. With several bands
the noise is correlated over rounds (`banded`), and clients take part at most once in so many of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from atoll.privacy.accounting import Release
from atoll.privacy.adaptive_clipping import multiplier_of_sum, noised_fraction
from atoll.privacy.banded import CorrelatedNoise
from atoll.privacy.clipping import clipped_sum
from atoll.privacy.noise import Lattice, RandomBits, lattice_for
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class CentralGaussian:
    """Clip, sum, noise, divide: one object, so that the noise always fits the sensitivity.

    `sampling_rate` is the rate of Poisson sampling; 1 for a cohort of fixed size, which amplifies
    nothing here. `expected_cohort` is the divisor. `record` is told what a release costs before its
    noise is drawn; if it raises, nothing is released. With a `count_deviation` it is also told, in
    private and at no extra cost, which part of the norms was within the clipping norm. `correlation` holds
    what noise of several bands needs of earlier rounds, and keeps this round's.

    >>> import torch
    >>> from atoll.privacy.noise import entropy
    >>> from atoll.protocol.messages import Update
    >>> mechanism = CentralGaussian(
    ...     clipping_norm=0.5, noise_multiplier=1.1, expected_cohort=2.0, sampling_rate=1.0,
    ...     random_bits=entropy,
    ... )
    >>> updates = [Update(name, 1, {"w": torch.ones(3)}, 1) for name in ("a", "b")]
    >>> mean, _ = mechanism.release(updates, {"w": torch.zeros(3)})
    >>> mean["w"].shape, mean["w"].dtype, mechanism.event
    (torch.Size([3]), torch.float64, Release(noise_multiplier=1.1, sampling_rate=1.0))
    """

    clipping_norm: float
    noise_multiplier: float
    expected_cohort: float
    sampling_rate: float
    random_bits: RandomBits
    record: Callable[[Release], None] = lambda cost: None
    count_deviation: float | None = None
    correlation: CorrelatedNoise = field(default_factory=CorrelatedNoise)

    def __post_init__(self) -> None:
        for name in ("clipping_norm", "noise_multiplier", "expected_cohort"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")

    @property
    def event(self) -> Release:
        """What each call of `release` spends; with several bands, each participation of a client."""
        return Release(self.noise_multiplier, self.sampling_rate)

    def release(self, updates: Sequence[Update], model: Tensors) -> tuple[Tensors, float | None]:
        """(the noised mean delta in float64, the noised fraction of norms within the clipping norm).

        The noise does not depend on how many answered; with no update at all it is noise alone.
        Tensors are taken in the order of their names.
        """
        names = sorted(model)
        sizes = [model[name].numel() for name in names]
        total, within = np.zeros(sum(sizes)), 0
        if len(updates):
            summed, norms = clipped_sum(updates, clipping_norm=self.clipping_norm)
            total = torch.cat([summed[name].reshape(-1) for name in names]).numpy()
            within = int((norms <= self.clipping_norm).sum())
        self.record(self.event)
        noisy = self.correlation.release(total, self.lattice(len(total))) / self.expected_cohort
        parts = torch.split(torch.from_numpy(noisy), sizes)
        mean = {name: part.reshape(model[name].shape) for name, part in zip(names, parts, strict=True)}
        return mean, self._fraction(within, len(updates))

    def _fraction(self, within: int, answered: int) -> float | None:
        if self.count_deviation is None:
            return None
        noise = float(Lattice(self.count_deviation, self.random_bits).noise(1)[0])
        return noised_fraction(within, answered, noise=noise, expected_cohort=self.expected_cohort)

    def lattice(self, numbers: int) -> Lattice:
        """The noise for a sum of so many numbers: its sensitivity is the clipping norm, and the rounding.

        A participation is rounded in as many rounds as there are bands. One that a run's end cuts off after
        r rounds has a part of the squared column norm that is at least r / bands, as coefficients fall:
        its rounding is within its part of the bound too.
        """
        left = self.noise_multiplier
        if self.count_deviation is not None:
            left = multiplier_of_sum(self.noise_multiplier, self.count_deviation)
        return lattice_for(left, self.clipping_norm, self.correlation.bands * numbers, self.random_bits)

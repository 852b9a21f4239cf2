"""Client-level privacy at a trusted server: Gaussian noise on the sum of a round's clipped updates.

Guarantee: (epsilon, delta) for one client's whole participation, neighbours differing by adding or
removing one client, against everyone who sees the models but not the updates; the server sees the
updates and is trusted. `privacy.accounting` computes epsilon from the recorded releases. Not covered: which
clients were asked, how long rounds took, and what clients publish elsewhere.

McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", with equal weights
and a fixed divisor: the expected cohort, a public number, never how many clients answered. With several bands
the noise is correlated over rounds (`banded`), and a client takes part at most once in that many rounds.
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
    """The mechanism of client-level privacy: it clips, sums, noises and divides a round's updates.

    Each update is clipped to the L2 norm `clipping_norm` over all its tensors. Their sum gets discrete
    Gaussian noise, drawn from `random_bits`, of deviation `noise_multiplier` times the sensitivity, which is
    the clipping norm and what rounding adds. It is then divided by `expected_cohort`. `sampling_rate` is the
    rate of Poisson sampling, or 1 for a cohort of fixed size, which is not amplified. `record` is called with
    the cost of a release before its noise is drawn; if it raises, nothing is released. With a
    `count_deviation`, `release` also returns the noised fraction of norms within the clipping norm, at no
    extra cost. `correlation` holds the earlier rounds' sums that banded noise needs.

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

    Raises:
        ValueError: a number isn't finite and positive, or the sampling rate isn't in (0, 1].
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
        """The cost of each call of `release`; with several bands, of each participation of a client."""
        return Release(self.noise_multiplier, self.sampling_rate)

    def release(self, updates: Sequence[Update], model: Tensors) -> tuple[Tensors, float | None]:
        """(the noised mean delta in the shapes of `model`, float64; the noised fraction of norms, or None).

        The fraction is that of norms within the clipping norm; None without a `count_deviation`. The noise
        does not depend on how many clients answered: without any update the result is noise alone. Tensors
        are processed in the order of their names.
        """
        names = sorted(model)
        sizes = [model[name].numel() for name in names]
        total, within = np.zeros(sum(sizes)), 0
        if len(updates):
            summed, norms = clipped_sum(updates, clipping_norm=self.clipping_norm)
            total = summed.numpy()
            within = int((norms <= self.clipping_norm).sum())
        self.record(self.event)
        noisy = self.correlation.release(total, self.lattice(len(total)))
        noisy /= self.expected_cohort
        parts = torch.split(torch.from_numpy(noisy), sizes)
        mean = {name: part.reshape(model[name].shape) for name, part in zip(names, parts, strict=True)}
        return mean, self._fraction(within, len(updates))

    def _fraction(self, within: int, answered: int) -> float | None:
        if self.count_deviation is None:
            return None
        noise = float(Lattice(self.count_deviation, self.random_bits).noise(1)[0])
        return noised_fraction(within, answered, noise=noise, expected_cohort=self.expected_cohort)

    def lattice(self, numbers: int) -> Lattice:
        """The noise for a sum of `numbers` numbers, whose sensitivity is the clipping norm plus rounding.

        A participation is rounded in as many rounds as there are bands. One that the end of a run cuts off
        after r rounds has at least r / bands of the squared column norm, since coefficients decrease, so its
        rounding is within its share of the bound too.
        """
        left = self.noise_multiplier
        if self.count_deviation is not None:
            left = multiplier_of_sum(self.noise_multiplier, self.count_deviation)
        return lattice_for(left, self.clipping_norm, self.correlation.bands * numbers, self.random_bits)

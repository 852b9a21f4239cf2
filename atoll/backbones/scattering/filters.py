"""The filters of `atoll:scattering`, in closed form: Morlet wavelets, and the Gaussian that smooths.

They are those of kymatio (Andreux et al. 2020, "Kymatio: Scattering Transforms in Python"), made periodic.
"""

from __future__ import annotations

import math

import torch

SCALES = 2
ANGLES = 8
STRIDE = 2**SCALES
"""Pixels from one place that features are read at to the next, and pixels that a border is mirrored."""

_WIDTH = 0.8
"""Deviation of the finest wavelet's and of the smoothing Gaussian's envelope, in pixels at scale 0."""
_REACH = 32
"""Pixels after which a filter is nothing: ten of the coarse wavelet's deviation across its angle."""


def morlet(period: int, scale: int, angle: int) -> torch.Tensor:
    """The wavelet psi of a scale and an angle's number, complex128 [period, period]; its sum is zero.

    exp(-(u^2 + v^2 / 4) / (2 s^2)) (exp(i k u) - c) / (4 pi s^2) with s = 0.8 * 2^scale and
    k = 3 pi / 4 / 2^scale, where u and v are a pixel's place along and across the angle (3 - angle) pi / 8,
    and c makes the sum zero; values of copies a period apart are added up.
    """
    deviation, slant = _WIDTH * 2**scale, 4 / ANGLES
    turned = (ANGLES // 2 - 1 - angle) * math.pi / ANGLES
    copies = 2 * _copies(period) + 1
    places = torch.arange(copies * period, dtype=torch.float64) - _copies(period) * period
    across, along = torch.meshgrid(places, places, indexing="ij")
    u = math.cos(turned) * along + math.sin(turned) * across
    v = math.cos(turned) * across - math.sin(turned) * along
    envelope = torch.exp(-(u**2 + (slant * v) ** 2) / (2 * deviation**2))
    wave = envelope * torch.exp(0.75j * math.pi / 2**scale * u)
    shape = (copies, period, copies, period)
    wave, gauss = (values.reshape(shape).sum((0, 2)) for values in (wave, envelope))
    wavelet: torch.Tensor = wave - wave.sum() / gauss.sum() * gauss
    return wavelet.mul_(slant / (2 * math.pi * deviation**2))


def _copies(period: int) -> int:
    """Periods to each side from which a filter still reaches into the middle one."""
    return -(-_REACH // period)


def smoothing(side: int, step: int) -> torch.Tensor:
    """The Gaussian phi along one axis: from every `step`-th pixel with the border to every fourth without.

    float64 [side / 4, period / step]; phi is the product of one such factor for rows and one for columns.
    """
    period, deviation = side + 2 * STRIDE, _WIDTH * 2 ** (SCALES - 1)
    read = torch.arange(STRIDE, STRIDE + side, STRIDE, dtype=torch.float64)
    there = torch.arange(0, period, step, dtype=torch.float64)
    copies = torch.arange(-_copies(period) - 1, _copies(period) + 2)
    distance = (read[:, None] - there[None]).unsqueeze(-1) + period * copies
    density: torch.Tensor = torch.exp(-(distance**2) / (2 * deviation**2)).sum(-1)
    return density.mul_(step / (math.sqrt(2 * math.pi) * deviation))
